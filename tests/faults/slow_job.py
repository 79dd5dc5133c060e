"""A real job, slowed down: its teachers pause before each batch as long as a file is there.

    python tests/faults/slow_job.py FILE SECONDS OPTIONS

OPTIONS are those of the job, in JSON. A test gets time that way to change the cluster under a job,
on a machine of any speed.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import ray

from tokenlabel.annotate import AnnotateConfig, annotate
from tokenlabel.annotate.cluster import actor
from tokenlabel.annotate.plan import Identity


class SlowActor(actor.TeacherActor):
    """The product's actor, with a teacher that waits. Travels to the nodes by value."""

    pause: tuple[Path, float]

    @ray.method(concurrency_group="control")
    def ready(self) -> Identity:
        identity = super().ready()
        teacher: Any = self._worker._teacher
        annotate, (file, seconds) = teacher.annotate, self.pause

        def waiting(*arguments: Any) -> Any:
            if file.exists():
                time.sleep(seconds)
            return annotate(*arguments)

        teacher.annotate = waiting
        return identity


if __name__ == "__main__":
    SlowActor.pause = (Path(sys.argv[1]), float(sys.argv[2]))
    vars(actor)["TeacherActor"] = SlowActor
    options = json.loads(sys.argv[3])
    report = annotate(AnnotateConfig(**options))
    sys.exit(not report.ok)
