"""python tests/stuck.py PROCESS CLIPS, and the flags of dit_video.train: trains, but in one process the data hang.

In process PROCESS every clip of the embedded world after the first CLIPS is waited for without end, as a read from a
disk that is gone; or, where CLIPS is 'save', each save once its arrays are written, as that disk itself.
"""

import pathlib
import sys
import time


def main():
    sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)
    from dit_video import checkpoint
    from dit_video.data.shapes import ShapesSource
    from dit_video.train import run

    process, clips = sys.argv.pop(1), sys.argv.pop(1)
    read, count = ShapesSource.__getitem__, [0]

    def read_or_hang(source, index):
        count[0] += 1
        while count[0] > int(clips):
            time.sleep(1)
        return read(source, index)

    if f"--process_id={process}" in sys.argv or process == "alone":
        if clips == "save":
            checkpoint._write_sums = lambda path: time.sleep(100_000)
        else:
            ShapesSource.__getitem__ = read_or_hang
    run()


if __name__ == "__main__":
    main()
