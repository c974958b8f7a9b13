"""Names that SGLang's modules import; none is called for text."""


def __getattr__(name):
    if name == "InterpolationMode":
        from torchvision.transforms import InterpolationMode

        return InterpolationMode
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*args, **kwargs):
        raise RuntimeError(f"torchvision function {name}: this SGLang server was started with a torchvision stub")

    return absent
