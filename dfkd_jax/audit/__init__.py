"""What a run reveals of the teacher's training images: membership inference, measured.

`membership` turns scores into figures, `scores` makes them, and `measurement` reads a run and its
images.  Real images are only measured on: nothing here trains, and no image is written.
"""
