"""How well the features of a trained network transfer to other images and tasks."""
