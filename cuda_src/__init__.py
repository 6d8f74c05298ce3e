"""The CUDA sources (`*.cu`, `include/*.cuh`) as package data; see README.md beside this file."""
