"""The import paths of TorchOpt's zeroth-order differentiation, for programs written against them.

.. code-block:: python

    import zograd.compat.torchopt as torchopt
    from zograd.compat.torchopt.nn import ZeroOrderGradientModule

    @torchopt.diff.zero_order(distribution, method="naive", argnums=0, num_samples=100, sigma=0.01)
    def loss(params, data): ...

    class Net(ZeroOrderGradientModule, method="naive", num_samples=100, sigma=0.01): ...
"""

from zograd.compat.torchopt import diff, nn

__all__ = ["diff", "nn"]


def __dir__() -> list[str]:
    return __all__
