"""What a run keeps on disk: checkpoints, model folders, its workdir; and guards for reading."""
