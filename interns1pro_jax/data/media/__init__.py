"""Files of images, videos and signals, read within bounds.

    limits.py    MediaError, what a file may cost, and where its bytes come from
    images.py    read_image: pixels of a still image
    videos.py    probe_video, read_video: sampled frames and their times
    signals.py   read_signal: samples, rate and unit of npy, csv, wav, flac, mp3, ogg, MiniSEED, EDF, BDF and WFDB files

A file is somebody else's: sizes are checked from its header before anything is unpacked, and whatever is wrong with it (absent, cut
short, a bomb, not numbers, two rates where one is needed) is a `MediaError` that names the file, the value and the remedy.
"""
