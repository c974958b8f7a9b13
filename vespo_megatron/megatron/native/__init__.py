"""The `native` layer spec: plain PyTorch layers that run on CPU and on any GPU, and the reference for the others."""
