"""Config section of the asynchronous index: export, refresh, staleness."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from realm.models.precision import Precision
from realm.runtime.section import MAX_INT, MAX_PROCESSES, Section


@dataclass(frozen=True)
class RefreshConfig(Section):
    """Asynchronous index refresh: when the trainer exports the retriever, how the refresher builds
    an index from it, and how far the index may lag behind the trainer."""

    export_every: int = 500
    """Steps between exports of the retriever; 0: export on drift only."""
    max_drift: float | None = None
    """Also export when the embeddings of the drift reference passages have moved by this much since
    the last export (mean of 1 − cosine)."""
    drift_every: int = 50
    """Steps between measurements of the drift, if `max_drift` is set."""
    drift_passages: int = 256
    """Drift reference passages: a fixed random sample on which the trainer and each index version
    measure drift."""
    staleness_multiplier: int = 1
    """Export only at every N-th multiple of `export_every`: for experiments with stale indexes (Guu
    et al. 2020, section 4.4)."""
    factory: str = "Flat"
    """FAISS index factory string."""
    search_parameters: str = ""
    """FAISS search parameters, separated by commas: `nprobe=32` (inverted lists), `efSearch=128`
    (HNSW), `k_factor_rf=4` (refinement). Stored with each index version."""
    search_on: Literal["cpu", "gpu"] = "cpu"
    """Device on which trainer and evaluation search. gpu: with the GPU build of FAISS; without it,
    flat indexes are searched exactly with torch."""
    shard_rows: int = 50_000
    """Passages per encoding shard, the unit of work that a killed refresher repeats."""
    token_budget: int = 4096
    """Padded wordpieces per encoding batch."""
    precision: Precision = "fp32"
    """Precision of encoding; embeddings are stored as fp32."""
    compile: bool = False
    """Compile the encoder for each version (torch.compile; on a CPU it needs a C++ compiler).
    Compiling takes half a minute and pays off from about 10,000 passages."""
    threads: int = 1
    """CPU threads of the refresher."""
    poll_s: float = 0.5
    """Polling interval of refresher and trainer in seconds."""
    keep_last: int = 3
    """Number of most recent index versions to keep."""
    grace_s: float = 60.0
    """Seconds for which a replaced index version is kept."""
    lease_expiry_s: float = 30.0
    """Seconds without a heartbeat after which another refresher takes over."""
    max_stale_steps: int | None = None
    """Steps by which the index may lag behind the trainer; default: unbounded."""
    stale_policy: Literal["warn", "wait", "stop"] = "warn"
    """What the trainer does if the index lags by more than `max_stale_steps`."""
    wait_timeout_s: float = 120.0
    """Maximum seconds to wait for an index, at the start and under the policy `wait`; after that,
    training stops with an error."""

    @property
    def export_period(self) -> int:
        """Steps between exports, `staleness_multiplier` included; 0: export on drift only."""
        return self.export_every * self.staleness_multiplier

    def problems(self) -> Iterator[str]:
        yield from self.at_least(0, "export_every", "max_drift", "grace_s", "max_stale_steps", "wait_timeout_s")
        yield from self.positive("poll_s", "lease_expiry_s")
        yield from self.at_most(MAX_PROCESSES, "threads")
        yield from self.at_most(2, "max_drift")
        yield from self.at_most(MAX_INT, "poll_s", "grace_s", "lease_expiry_s", "wait_timeout_s")
        yield from self.at_least(
            1,
            "drift_every",
            "drift_passages",
            "staleness_multiplier",
            "shard_rows",
            "token_budget",
            "threads",
            "keep_last",
        )
        if self.export_every == 0 and self.max_drift is None:
            yield (
                "export_every is 0 and refresh.max_drift is not set, so the retriever is never exported; "
                "set one of them"
            )
        too_tight = self.max_stale_steps is not None and (
            self.export_period == 0 or self.max_stale_steps < self.export_period
        )
        if too_tight and self.stale_policy != "warn":
            yield (
                f"max_stale_steps ({self.max_stale_steps}) must be at least refresh.export_every "
                f"({self.export_every or 'exports on drift only'}) times staleness_multiplier "
                f"({self.staleness_multiplier}) with stale_policy {self.stale_policy}, because the trainer would "
                "otherwise wait for an export that it has not made yet; raise refresh.max_stale_steps, "
                "or set stale_policy to warn"
            )
