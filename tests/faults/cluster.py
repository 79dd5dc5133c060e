"""Run by tests: a Ray cluster of this machine alone, in a process of its own.

Ray reads how to bind and whom to trust from the environment as it is imported, so neither can be
set in the test's process. Prints the address, then the raylet's process id for each line it reads:
`add` starts a node in place of the last one, whose raylet was killed. Stops the cluster at the end
of its input.
"""

import json
import sys

from ray.cluster_utils import Cluster

#: Far below what a node has by default, for there are several on this machine.
SIZE = {"num_cpus": 2, "object_store_memory": 80 << 20}
#: A raylet that does not answer is dead after 2 seconds, not after 15.
SYSTEM = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
}


def main() -> None:
    """Start a head node, and obey."""
    head = {**SIZE, "include_dashboard": False, "_system_config": SYSTEM}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    print(json.dumps(cluster.address), flush=True)
    for line in sys.stdin:
        assert line.strip() == "add", line
        for node in list(cluster.worker_nodes):
            # Its workers watch their raylet's process id, which is there until it is waited for.
            raylet(node).wait(60)
            cluster.remove_node(node, allow_graceful=False)
        print(json.dumps(raylet(cluster.add_node(**SIZE)).pid), flush=True)
    cluster.shutdown()


def raylet(node):
    """The process of a node's raylet."""
    return node.all_processes["raylet"][0].process


if __name__ == "__main__":
    main()
