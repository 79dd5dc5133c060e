"""Run by tests: a Ray cluster of this machine alone, in a process of its own.

    python -m tests.faults.cluster GPUS

Ray reads how to bind and whom to trust from the environment as it is imported, so neither can be
set in the test's process. Prints the address; then, for each line that it reads, the process id of
the raylet of one more node. The line is the process id of a killed raylet, whose node is removed
before, or 0. Nodes have GPUS GPUs each: Ray believes that number. Stops the cluster at the end
of its input.
"""

import json
import sys
import time
from contextlib import suppress

from ray._private import services
from ray.cluster_utils import Cluster

#: Far below what a node has by default, for there are several on this machine.
SIZE = {"num_cpus": 2, "object_store_memory": 80 << 20}
#: A raylet that does not answer is dead after 2 seconds, not after 15.
SYSTEM = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
}
_get_node = services.get_node


def get_node(*given):
    """Ray's, which gives a node 30 seconds to start; a busy machine may need more."""
    for _ in range(300):
        with suppress(RuntimeError):
            return _get_node(*given)
        time.sleep(1)
    return _get_node(*given)


services.get_node = get_node


def main(gpus: int) -> None:
    """Start a head node, then a node a line."""
    size = {**SIZE, "num_gpus": gpus}
    head = {**size, "include_dashboard": False, "_system_config": SYSTEM}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    print(json.dumps(cluster.address), flush=True)
    for dead in map(int, sys.stdin):
        for node in list(cluster.worker_nodes):
            if raylet(node).pid == dead:
                # Its workers watch this process id, which is there until it is waited for.
                raylet(node).wait(60)
                cluster.remove_node(node, allow_graceful=False)
        print(json.dumps(raylet(cluster.add_node(**size)).pid), flush=True)
    cluster.shutdown()


def raylet(node):
    """The process of a node's raylet."""
    return node.all_processes["raylet"][0].process


if __name__ == "__main__":
    main(int(sys.argv[1]))
