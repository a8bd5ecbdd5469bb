"""The masks M, M' and M'' of a batch from its raw score maps (E2, E3, E11, E12 of docs/method.md).

Nothing is differentiated. Of the K rows that a mask compares, those of absent classes are 0 and background is row 0,
which is never negative and wins every tie. So the mask needs only the best of the image's own classes, kept while they
pass by, and the background row. Softmax keeps the order of the logits: the best object is that of the largest logit,
and one pass over the K logits that also sums exp(z - max) gives its score.

Bytes of the fused kernel, an image of t tags and e bytes an element: it reads e·N·(t + K) of the two maps, 4·N of
saliency and N of `valid`, and writes 3·N. Each tile of pixels reads the maps of the image's classes once more for their
spatial maximum, from the cache. At B16, 41×41, 21 classes, t = 3, bf16 that is 1.5 MB, so the one launch is what it
costs; the plain form makes some 40 launches and about as many passes over [B, K, H, W] in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import Implementation, Operation, runs_triton

OPERATION = Operation("pseudo_masks", Implementation("triton", "pseudo_masks.triton", runs_triton))

RULES = ("paper", "authors")


def pseudo_masks(
    heatmap: Tensor,
    tags: Tensor,
    saliency: Tensor | None,
    valid: Tensor | None = None,
    *,
    logits: Tensor | None = None,
    context_heatmap: Tensor | None = None,
    threshold: float,
    cam_background: str = "paper",
    background_power: float = 1.0,
    context_background: str = "paper",
    saliency_weight: float = 0.5,
    merge_rule: str = "paper",
    backend: str = "auto",
) -> Tensor:
    """The CAM mask M and, where a second map is given, the context mask M' and the merged mask M''.

    Args:
        heatmap: [B, L, H, W] floating point, class scores before any activation; M comes from it (E2, E3).
        tags: bool [B, L].
        saliency: floating point [B, H, W] in 0…1 on the heatmap's grid, or None.
        valid: bool [B, H, W]; pixels outside are ignored and take part in no spatial maximum. None: all.
        logits: [B, K, H, W], K = L + 1; M' is the E3 rule on softmax(logits)·Y (E11).
        context_heatmap: [B, L, H, W]; M' comes from it as M from `heatmap`. At most one of the two.
        threshold: T_a; pixels whose best score is below are ignored.
        cam_background: rule of the CAM background row and of ε, `paper` or `authors`.
        background_power: α of the CAM background row, 0 or more.
        context_background: rule of the background row of M', `paper` or `authors`.
        saliency_weight: w of the `authors` background row of M'.
        merge_rule: of M'' (E12), `paper` or `authors`.
        backend: auto | reference | triton | native.

    Returns:
        uint8 [3, B, H, W]: M, M', M''; without a second map [1, B, H, W]: M alone. 255 is ignore. Not differentiable.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown rule, a negative power, two second maps.
    """
    _check(heatmap, tags, saliency, valid, logits, context_heatmap)
    for name, rule in (("cam_background", cam_background), ("context_background", context_background),
                       ("merge_rule", merge_rule)):  # fmt: skip
        if rule not in RULES:
            raise ValueError(f"pseudo_masks: {name} must be one of {', '.join(RULES)}, got {rule!r}")
    if background_power < 0:
        raise ValueError(f"pseudo_masks: background_power must be 0 or more, got {background_power}")
    implementation = OPERATION.select(backend, heatmap)
    return implementation(
        heatmap, tags, saliency, valid, logits=logits, context_heatmap=context_heatmap, threshold=threshold,
        cam_background=cam_background, background_power=background_power, context_background=context_background,
        saliency_weight=saliency_weight, merge_rule=merge_rule,
    )  # fmt: skip


def _check(
    heatmap: Tensor, tags: Tensor, saliency: Tensor | None, valid: Tensor | None, logits: Tensor | None,
    context_heatmap: Tensor | None,
) -> None:  # fmt: skip
    def require(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
        if tensor is None:
            return
        fits = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
        if tensor.shape != shape or not fits or tensor.device != heatmap.device:
            raise ValueError(
                f"pseudo_masks: {name} must be {dtype or 'floating point'} {list(shape)} on {heatmap.device}, "
                f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )

    if heatmap.dim() != 4 or not heatmap.is_floating_point():
        got = f"{heatmap.dtype} {list(heatmap.shape)}"
        raise ValueError(f"pseudo_masks: heatmap must be floating point [B, L, H, W], got {got}")
    if logits is not None and context_heatmap is not None:
        raise ValueError("pseudo_masks: the context mask comes from logits or from context_heatmap, got both")
    batch, objects, *grid = heatmap.shape
    if not 1 <= objects < 255:
        raise ValueError(f"pseudo_masks: uint8 masks hold 1 to 254 object classes, got {objects}")
    require("tags", tags, (batch, objects), torch.bool)
    require("saliency", saliency, (batch, *grid))
    require("valid", valid, (batch, *grid), torch.bool)
    require("logits", logits, (batch, objects + 1, *grid))
    require("context_heatmap", context_heatmap, (batch, objects, *grid))
