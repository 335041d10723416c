"""What two hosts change in a mask: nothing beside two ranks of one host, and counted weights beside one rank.

The built-in model and language, TAMT-MLM, TAMT-KD (``--preset fast``) and IMP to 30 %, ZeRO-2, fp32; needs root for
hosts of its own (network namespaces with an sshd each), on which a rank each runs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import closing
from pathlib import Path

from finemask_ds.config import ImpConfig, SearchConfig, TamtConfig
from finemask_ds.engine.world import World
from finemask_ds.provenance import collect
from finemask_ds.recipes.stages import REPOSITORY
from finemask_ds.run import write_json

sys.path.insert(0, str(REPOSITORY))
from tests.cluster.hosts import Hosts
from tests.cluster.ranks import HostRankPool
from tests.cluster.test_equality import all_masks, equal, found_with_scores, last_mask, otherwise
from tests.pool import RankPool

SHARED = {"model": "builtin", "data": "builtin", "batch_size": 16, "seq_len": 64, "dropout": 0.0, "eval_every": 0,
          "dev_blocks": 64}  # fmt: skip


def config_of(name: str, run: Path, steps: int, *, is_alone: bool) -> SearchConfig:
    more = {**SHARED, "run": str(run), "deepspeed": "" if is_alone else str(REPOSITORY / "configs/ds/zero2.json")}
    if name == "imp":
        return ImpConfig(sparsity=0.3, interval_steps=steps // 2, lr=2e-4, **more)
    return TamtConfig(
        sparsity=0.7, steps=steps, objective=name.removeprefix("tamt-"), preset="fast", save_every=steps, **more
    )


def measure(name: str, folder: Path, steps: int, apart: HostRankPool, together: RankPool) -> dict[str, object]:
    configs = [config_of(name, folder / name / where, steps, is_alone=where == "alone")
               for where in ("apart", "together", "alone")]  # fmt: skip
    on_hosts = apart.run(found_with_scores, configs[0], timeout_sec=1200)[0]
    on_one = together.run(found_with_scores, configs[1], timeout_sec=1200)[0]
    alone = found_with_scores(World(), configs[2])
    same = equal(on_hosts[1], on_one[1]) and all_masks(configs[0]) == all_masks(configs[1])
    mask = last_mask(configs[2])
    flipped, could = otherwise(mask, alone[1], last_mask(configs[0]), on_hosts[1])
    apart_by = max(float(abs(alone[1][name] - on_hosts[1][name]).max()) for name in mask)
    return {
        "search": name, "steps": steps, "weights": sum(map(mask.num_weights, mask)), "hosts_equal_ranks": same,
        "largest_difference": apart_by, "fell_otherwise": flipped, "could": could,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "results" / "hosts.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hosts = Hosts.up(2, folder / "hosts")
        try:
            rows = []
            with closing(HostRankPool(hosts)) as apart, closing(RankPool(2)) as together:
                for search in ("tamt-mlm", "tamt-kd", "imp"):
                    rows.append(measure(search, folder, arguments.steps, apart, together))
                    print(rows[-1], flush=True)
        finally:
            hosts.down()
    write_json(arguments.out, {"rows": rows, "provenance": collect()})


if __name__ == "__main__":
    main()
