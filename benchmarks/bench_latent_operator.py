"""The latent operator in LSO's and LSM's configurations and with the whole image as one patch."""

from __future__ import annotations

from benchmarks.rows import for_each, of_operation, record
from fastfusion.benchmarking import latent

SIZE = (1, 64, 256, 256)
LSO, LSM = latent(), latent(4, 12, 16, squash=False)
WHOLE = latent(4, 12, None, squash=False)
ROWS = [
    of_operation("latent_operator LSO 4x4", LSO, SIZE, {"eager": 40, "compiled": 11, "share": 0.5}),
    of_operation(
        "latent_operator LSO 4x4",
        LSO,
        SIZE,
        {"eager": 20, "compiled": 6, "share": 0.4},
        train=True,
    ),
    *(
        of_operation(
            f"latent_operator {name}", work, SIZE, {"eager": 12, "compiled": 4, "share": 0.5}
        )
        for name, work in (("LSM 16x16", LSM), ("whole image", WHOLE))
    ),
]


@for_each(ROWS)
def bench(benchmark, row, contestant):
    record(benchmark, row, contestant)
