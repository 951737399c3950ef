"""Files: checkpoints, model folders, the folder of a run, and files of others, read with care."""
