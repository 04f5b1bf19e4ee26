"""What an accelerator can do: whether it multiplies in bfloat16, and how fast it multiplies in 16 bits."""

import re

# Dense products in 16 bits (bfloat16; T4 and V100: float16) with sums in float32, in 10^12 operations a second, by the
# name that torch gives a device. From NVIDIA's data sheets and architecture white papers; where these give the figure
# with sparsity alone, half of it. What runs below its data sheet, such as a slice of a GPU (MIG) or a laptop's, has
# another name and no figure.
PEAK_TERAFLOPS = (
    (r"Tesla T4", 65),
    (r"Tesla V100-PCIE-\d+GB", 112),
    (r"Tesla V100-SXM2-\d+GB", 125),
    (r"NVIDIA A10", 125),
    (r"NVIDIA A10G", 70),
    (r"NVIDIA A100-(SXM4|PCIE)-\d+GB|NVIDIA A100 \d+GB PCIe", 312),
    (r"NVIDIA GeForce RTX 3090", 71),
    (r"NVIDIA GeForce RTX 4090", 165.2),
    (r"NVIDIA L4", 121),
    (r"NVIDIA L40", 181),
    (r"NVIDIA L40S", 362),
    (r"NVIDIA H100 PCIe", 756),
    (r"NVIDIA H100 NVL|NVIDIA H200 NVL", 835),
    (r"NVIDIA H100 \d+GB HBM3|NVIDIA H200", 989),
    (r"NVIDIA B200", 2250),
)


def multiplies_bf16() -> bool:
    """Whether the accelerator multiplies in bfloat16 itself. Older GPUs emulate it, more slowly than float32, and so
    do some of Apple's, which torch does not tell from the others: there it has to be asked for.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.xpu.is_available() and torch.xpu.is_bf16_supported(including_emulation=False)


def device_name() -> str:
    """The accelerator's name where torch has one for it, else its kind: "Tesla T4", "mps"."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if torch.xpu.is_available():
        return torch.xpu.get_device_name()
    return str(torch.accelerator.current_accelerator() or "the CPU")


def peak_flops(name: str) -> float | None:
    """Operations a second of a device by its name, see PEAK_TERAFLOPS; None where they are not known."""
    return next((peak * 1e12 for pattern, peak in PEAK_TERAFLOPS if re.fullmatch(pattern, name)), None)
