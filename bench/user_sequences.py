"""Random sequences of what users do to a pipeline, searched for images that are wrong without a word.

    python -m bench.user_sequences --sequences 300

The state machine of `tests/properties/test_users.py`, which CI runs on 20 sequences: draws in whose callbacks latents are
replaced, scaled, exchanged or given noise, prompts, adapters, noise levels and settings change, images are drawn inside of
images, aborted or interrupted; direct calls, other schedulers, dtypes, attention kernels, copies, offload. An uncached pipeline
goes through the same; every image of the cached one is within the bound, or there was an error. The status is 1 if a sequence
was found where neither is so.
"""

import argparse
import sys
import time
import traceback

from bench.record.recording import write_result
from bench.record.render import table


def main() -> int:
    """Run and write bench/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=300, help="of 20 actions each (default 300)")
    parser.add_argument("--start", type=int, default=0, help="another number, other sequences; CI's are of 0 (default)")
    arguments = parser.parse_args()
    from tests.properties.test_users import STEPS, search
    from tests.support.users import BOUND, LOOSE_BOUND, LOSS, RAN

    began = time.perf_counter()
    failure = search(arguments.sequences, start=arguments.start)
    minutes = (time.perf_counter() - began) / 60
    rows = [{"what": what, "times": RAN[what]} for what in sorted(RAN)]
    rows.append({"what": "wrong without a word", "times": 0 if failure is None else 1})
    notes = [
        f"{arguments.sequences} sequences of up to {STEPS} actions, the same in every run of one version of hypothesis; "
        f"{minutes:.0f} minutes, one process. mini-FLUX with two of its blocks, eager.",
        f"Every image has at least {BOUND:g} dB ({LOOSE_BOUND:g} where no error is measured), relative to the uncached "
        "pipeline's latents that went through the same, or the cached pipeline raised an error (refused), or the uncached one "
        f"did, or a callback aborted both. Where settings are hard (images to which nothing is done have less), {LOSS:g} dB "
        "less than the worst of three of those.",
    ]
    if failure is not None:
        traceback.print_exception(failure)
    print(table(rows))
    print(write_result("user_sequences", "Random sequences of users' actions", rows, notes=notes))
    return int(failure is not None)


if __name__ == "__main__":
    sys.exit(main())
