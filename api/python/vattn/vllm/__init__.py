"""Attention of vLLM over vattn: `vllm serve MODEL --attention-backend CUSTOM`.

vLLM finds `register` by its entry point group vllm.general_plugins and calls it in each of its
processes. Nothing changes unless the backend is asked for. Options are given through vLLM's own
configuration:

    vllm serve MODEL --attention-backend CUSTOM \
      --additional-config '{"vattn": {"tables": "MODEL.tables", "epsilon": 0.1}}'

api/python/VLLM.md in vattn's sources is the guide.
"""

from ._metrics import counters
from ._register import VERSIONS, register

__all__ = ["VERSIONS", "counters", "register"]
