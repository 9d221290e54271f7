"""A run whose workdir and clips lie in an object store: no directories, no appending.

The store is in memory. etils.epath reaches it through fsspec, and orbax's tensorstore by HTTP, as it would Google's.
"""

import http.server
import io
import json
import threading
import urllib.parse

import fsspec
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from test_trainer import WHOLE, tiny

from dit_video import Request, load, sample, train
from dit_video.checkpoint import CheckpointError, Checkpoints, digest
from dit_video.data import clips
from dit_video.gallery import write_gif, write_png
from dit_video.metrics import read_metrics


class Store(MemoryFileSystem):
    """Objects by name, under gs://: a directory is there while an object in it is, and an object is written whole."""

    protocol = ("gs", "gcs")
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.removeprefix("gs://"))

    def mkdir(self, path, create_parents=True, **_):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def _open(self, path, mode="rb", **more):
        assert mode in ("rb", "wb"), f"{path} is opened with mode {mode!r}"
        file = super()._open(path, mode, **more)
        return io.BytesIO(file.getvalue()) if mode == "rb" else file  # each reader has a place of its own


class Handler(http.server.BaseHTTPRequestHandler):
    """What tensorstore asks of Google Cloud Storage, answered from Store."""

    protocol_version = "HTTP/1.1"
    lock = threading.Lock()

    def log_message(self, *_):
        pass

    def answer(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def asked(self):
        """(the object's path in Store, the query)."""
        url = urllib.parse.urlsplit(self.path)
        query = {name: values[0] for name, values in urllib.parse.parse_qs(url.query).items()}
        bucket, _, name = url.path.split("/b/", 1)[1].partition("/o")
        return f"/{bucket}/{urllib.parse.unquote(name[1:]) or query.get('name', '')}", query

    def describe(self, path):
        generation = str(id(Store.store[path]) % 2**40 + 1) if path in Store.store else "0"
        return generation, {"name": path.split("/", 2)[2], "generation": generation}

    def refused(self, path, query):
        """Whether the object is not the one that the caller has seen."""
        wanted = query.get("ifGenerationMatch")
        return wanted is not None and wanted != self.describe(path)[0]

    def do_GET(self):
        path, query = self.asked()
        with self.lock:
            if "alt" not in query and path.count("/") == 2 and path.endswith("/"):
                names = [n for n in sorted(Store.store) if n.startswith(path + query.get("prefix", ""))]
                items = [self.describe(n)[1] | {"size": str(len(Store.store[n].getvalue()))} for n in names]
                return self.answer(200, json.dumps({"items": items}).encode(), Content_Type="application/json")
            if path not in Store.store:
                return self.answer(404)
            generation, body = self.describe(path)[0], Store.store[path].getvalue()
        if query.get("ifGenerationNotMatch") == generation:
            return self.answer(304)
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        part = body[int(first) : int(last) + 1 if last else None] if first else body[-int(last) :]
        begins = int(first) if first else len(body) - len(part)
        span = f"bytes {begins}-{begins + len(part) - 1}/{len(body)}"
        headers = {"x_goog_generation": generation} | ({"Content_Range": span} if "Range" in self.headers else {})
        self.answer(206 if "Range" in self.headers else 200, part, **headers)

    def do_POST(self):
        path, query = self.asked()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.lock:
            if self.refused(path, query):
                return self.answer(412)
            with Store().open(f"gs:/{path}", "wb") as file:
                file.write(body)
            described = self.describe(path)[1]
        self.answer(200, json.dumps(described).encode(), Content_Type="application/json")

    def do_DELETE(self):
        path, query = self.asked()
        with self.lock:
            if self.refused(path, query):
                return self.answer(412)
            found = Store.store.pop(path, None)
        self.answer(204 if found else 404)


@pytest.fixture
def bucket(monkeypatch):
    """gs://bucket, empty."""
    fsspec.register_implementation("gcs", Store, clobber=True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    yield epath.Path("gs://bucket")
    server.shutdown()
    server.server_close()
    Store.store.clear()


def test_checkpoints_in_a_bucket(bucket):
    """They come back exactly; one that was never completed is passed over, and a changed byte is found."""
    state = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "step": np.int32(1)}
    with Checkpoints(bucket / "run", keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state, {"at": step}, {"name": "a"}, wait=True)
        assert checkpoints.steps() == [2, 3]
    del Store.store["/bucket/run/00000003/SHA256SUMS"]
    with Checkpoints(bucket / "run") as checkpoints:
        restored = checkpoints.restore()
        assert (restored.step, restored.extra, restored.config) == (2, {"at": 2}, {"name": "a"})
        assert digest(restored.state) == digest(state)
        checkpoints.save(3, state, {}, {}, wait=True)
        assert checkpoints.steps() == [2, 3]
    for step in (2, 3):
        (bucket / "run" / f"{step:08d}" / "config.json").write_text("{ }")
    with (
        pytest.raises(CheckpointError, match=r"steps \[2, 3\] are all damaged"),
        Checkpoints(bucket / "run") as checkpoints,
    ):
        checkpoints.restore()


@pytest.mark.slow
def test_a_run_in_a_bucket_is_the_run_on_disk(bucket, tmp_path):
    """Clips from a bucket, a workdir in a bucket, gone on with after a stop: the parameters of a local, unbroken run.

    What it leaves there is sampled from like a local run.
    """
    for root in (bucket / "clips", tmp_path / "clips"):
        rng = np.random.default_rng(0)
        for name in "abc":
            write_gif(root / f"{name}.gif", rng.integers(200, size=(9, 16, 24, 1), dtype=np.uint8).repeat(3, 3), 8, 1)
        write_png(root / "d.png", rng.integers(200, size=(16, 16, 3), dtype=np.uint8))
        (root / "a.txt").write_text("the first")
    changes = {"data.kind": "clips", "data.max_side": 24, "optimizer.decay": 0.0}
    config = lambda root, steps: tiny(WHOLE | changes | {"data.root": str(root), "steps": steps})

    train(config(bucket / "clips", 1), bucket / "run")
    there = train(config(bucket / "clips", 2), "gs://bucket/run")
    here = train(config(tmp_path / "clips", 2), tmp_path / "run")
    assert digest(there) == digest(here)
    lines = [read_metrics(root / "run" / "metrics.jsonl") for root in (bucket, tmp_path)]
    assert [(row["step"], row["loss"]) for row in lines[0]] == [(row["step"], row["loss"]) for row in lines[1]]
    names = lambda root: {f"{p.parent.name}/{p.name}" for p in root.glob("*/*") if p.parent.name != "tensorboard"}
    assert {p.name for p in (bucket / "run").iterdir()} == {p.name for p in (tmp_path / "run").iterdir()}
    assert names(tmp_path / "run") <= names(bucket / "run")  # where step 1, then the last, is shown too
    assert not [path for path in Store.store if path.endswith(".partial")]

    request = Request("the first", width=16, height=16, frames=1)
    from_run, from_file = (sample([request], load(bucket / "run" / name))[0] for name in ("", "weights.safetensors"))
    assert np.abs(from_run.astype(int) - from_file).max() <= 8  # the file holds bfloat16


def test_clips_in_a_bucket_are_scanned_once(bucket):
    """The scan's cache lies in the bucket too: what has the same size is not decoded again, what has another is."""
    root, cache = bucket / "clips", bucket / "run" / "cache.jsonl"
    for name in "ab":
        write_png(root / f"{name}.png", np.full((16, 16, 3), 20, np.uint8))
    clips.scan(root, cache=cache)
    (root / "a.png").write_bytes(b"x" * len((root / "a.png").read_bytes()))
    (root / "b.png").write_bytes(b"x")
    (root / "c.mp4").write_bytes(b"")
    media, report = clips.scan(root, cache=cache)
    assert [(m.path, m.width) for m, _ in media] == [("gs://bucket/clips/a.png", 16)]
    assert [(row["file"], row["status"]) for row in report] == [
        ("a.png", "ok"), ("b.png", "rejected"), ("c.mp4", "rejected"),
    ]  # fmt: skip
    assert report[2]["reason"] == "empty file"


@pytest.mark.parametrize("workdir", ["s3://bucket/run", "file:///tmp/run", "memory://run"])
def test_a_workdir_that_cannot_hold_arrays_is_refused(workdir, tmp_path, monkeypatch):
    """Before anything is compiled or written: orbax has no other store."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoints lie on a disk or on gs://"):
        train(tiny(WHOLE | {"steps": 1}), workdir)
    assert not list(tmp_path.iterdir())
