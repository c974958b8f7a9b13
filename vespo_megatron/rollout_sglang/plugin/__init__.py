"""All that runs inside SGLang's own processes; the only part of this package that imports sglang."""
