"""Which CUDA devices there are."""

import torch


def missing_gpu(device: torch.device, instead: str) -> str | None:
    """If torch sees no such CUDA device: what was asked, what there is and what to do.

    :param instead: another way than a device that torch sees, such as "pass cpu".
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type != "cuda" or (device.index or 0) < count:
        return None
    if count:
        seen = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        return (
            f"no {device}: torch sees {count}. Allowed: {seen}. Choose one of these, or {instead}"
        )
    why, todo = "", "Check the driver and CUDA_VISIBLE_DEVICES"
    if not torch.version.cuda and not torch.version.hip:
        why = f", as torch {torch.__version__} is built without CUDA"
        todo = "Install a torch with CUDA"
    return f"no {device}: torch sees no CUDA device{why}. {todo}, or {instead}"
