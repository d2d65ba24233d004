"What the GPU tests count: a kernel whose twin gives the same numbers would pass every one of them without being launched."
from contextlib import contextmanager
from unittest.mock import patch


class Noted:
    "A function, or a Triton kernel that is launched by kernel[grid](…), whose calls are noted."
    def __init__(self, real, calls): self.real, self.calls = real, calls
    def __call__(self, *args, **kw):
        self.calls.append(args)
        return self.real(*args, **kw)
    def __getitem__(self, grid): return Noted(self.real[grid], self.calls)


@contextmanager
def ran(module, *names):
    "The arguments of all calls of some functions of a module; AssertionError when one of them was not called."
    calls = {name: [] for name in names}
    with patch.multiple(module, **{name: Noted(getattr(module, name), calls[name]) for name in names}): yield calls[names[0]] if len(names) == 1 else calls
    for name in names: assert calls[name], f'{module.__name__}.{name} was not called: something else gave these numbers'
