"""Takes a student out of the library: ONNX, StableHLO, safetensors, PyTorch, LiteRT and INT8.

`student` finds a network and its card, `card` says what a file holds and how its images are
prepared, `onnx_writer` and `onnx_operators` translate a traced function, `formats` writes files,
`quantise` makes INT8 from a run's synthetic images (`synthetic_images`), and `classify` reads any
of the files back and classifies pictures.
"""
