"""The processes that spend one budget: the first decides by the clock, the others compute with it when it asks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from lightning_fabric import Fabric

from fieldmark.errors import FieldmarkError, InterruptedRunError, ReportedElsewhereError
from fieldmark.runs.session import run_together
from fieldmark.runs.train import StopRequest, explain_lost_process

Value = TypeVar("Value")


class StoppedError(Exception):
    """A signal came."""


@dataclass(eq=False)
class Team:
    """One process's view of all of them, of which there may be just one."""

    fabric: Fabric  # device, precision, processes
    stop: StopRequest  # in the first, what any of them got
    are_others_waiting: bool = True  # to be asked, and not in the middle of something

    def work(self, course: Any, lead: Callable[[], object]) -> None:
        """In the first process do `lead`; in the others what it asks of them, with their own `course`, until it ends.

        An error ends all of them.
        """
        end: FieldmarkError | None = ReportedElsewhereError(0)
        try:
            lead() if self.fabric.is_global_zero else self._follow(course)
            end = None
        except InterruptedRunError as error:
            end = error
            raise
        except RuntimeError as error:
            raise explain_lost_process(self.fabric, error) from error
        finally:
            if self.fabric.is_global_zero and self.are_others_waiting:
                self.fabric.broadcast(end)

    def _follow(self, course: Any) -> None:
        while task := self.fabric.broadcast(cast(Any, None)):
            if isinstance(task, FieldmarkError):
                raise task
            work, given = task
            work(course, *given)

    def ask(self, course: Any, work: Callable[..., Value], *given: Any, **own: Any) -> Value:
        """In the first process: let all do `work(course, *given)`, a function that they find by its name; its result.

        `own` is for the first alone.
        """
        self.fabric.broadcast((work, given))
        self.are_others_waiting = False
        result = work(course, *given, **own)
        self.are_others_waiting = True
        return result

    def gather(self, work: Callable[[], Value]) -> list[Value]:
        """What each process finds, in all of them, or an error in all of them; also tells the first of a signal."""
        found = run_together(self.fabric, work)
        if self.fabric.world_size == 1:
            return [found]
        shares: list[Any] = [None] * self.fabric.world_size
        torch.distributed.all_gather_object(shares, (found, self.stop.signal_name))
        if signal_name := next((name for _, name in shares if name), ""):
            self.stop.signal_name = signal_name
        return [share for share, _ in shares]

    def agree(self, decide: Callable[[], Value]) -> Value:
        """In all processes what `decide` says in the first."""
        return self.gather(lambda: decide() if self.fabric.is_global_zero else None)[0]  # type: ignore[return-value]
