"""How well the features of a trained network transfer to other images and tasks.

`classification` has a linear probe and fine-tuning, `segmentation` a small FCN head.  Both take the
network from `network` and share the recipe, the training loop and the result in `measurement`.
"""
