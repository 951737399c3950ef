"""Devices and hosts: steps compiled for many devices, and many processes as one run."""
