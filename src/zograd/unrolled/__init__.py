r"""Gradients through long unrolls, a few steps at a time.

A system :math:`s_{t+1}, L_t = \text{window}(\theta, s_t)` runs on for many windows, and each of them should give a
gradient of what :math:`\theta` does, also by way of the state that earlier windows have left. Pairs of particles run
with perturbed parameters, :math:`\theta \pm \sigma \epsilon_{it}` in window t, and keep their states:

.. math:: \hat g_t = \frac{1}{2 N \sigma} \sum_{i=1}^{N} \left( w_{it}^+ L_{it}^+ + w_{it}^- L_{it}^- \right)

======================  =======================================  ====================================  ==============
estimator               perturbed in window t by                 weighted with :math:`w_{it}^+`        state of window t
======================  =======================================  ====================================  ==============
:class:`TruncatedES`    new :math:`\epsilon_{it}`                :math:`\epsilon_{it}`                 the center's
:class:`PES`            new :math:`\epsilon_{it}`                the sum of them since the episode's   its own
                                                                 beginning
:class:`NRES`           :math:`\epsilon_i`, the same for the     :math:`\epsilon_i`                    its own
                        whole episode
======================  =======================================  ====================================  ==============

:math:`w_{it}^-` is minus :math:`w_{it}^+`, as long as both particles of a pair began their episode together.
"""

from zograd.unrolled.estimators import NRES, PES, State, TruncatedES, UnrolledEstimator

__all__ = ["NRES", "PES", "State", "TruncatedES", "UnrolledEstimator"]


def __dir__() -> list[str]:
    return list(__all__)
