"""How commands that take a config read their flags: what is wrong is told in one line, before jax is loaded."""

import sys

from absl import app

from dit_video.allowed import check_config


def parse(config, argv):
    """absl's parser, but an unknown key, a value that is none of its key's, or a config that cannot be read, is one
    line instead of a traceback.

    config: the flag of `config_flags.DEFINE_config_file`.
    """
    try:
        left = app.parse_flags_with_usage(argv)
        _ = config.value.name  # a file that is not there is an error only once the config is used
    except (AttributeError, LookupError, OSError) as error:
        while isinstance(error.args[0], Exception):
            error = error.args[0]
        text = " ".join(str(error.args[0]).split())
        of_a_key = isinstance(error, AttributeError | KeyError)
        sys.exit(f"the config has no such key: {text}" if of_a_key else text)
    if len(left) > 1:
        sys.exit(f"{left[1]!r} is no flag: flags begin with --, as in --config.steps=100.")
    try:
        check_config(config.value)
    except ValueError as error:
        sys.exit(f"ValueError: {error}")
    return left
