"""mlm_loss on a CPU: not in C++ yet, the reference serves."""

from ...reference import mlm_loss_bwd, mlm_loss_fwd

__all__ = ["mlm_loss_bwd", "mlm_loss_fwd"]
