"""Argument check of the methods with one main task."""


def check_main(name: str, num_tasks: int, main: int) -> None:
    """Raises if ``main`` is not the index of a task."""
    if isinstance(main, bool) or not isinstance(main, int) or not 0 <= main < num_tasks:
        raise ValueError(
            f"{name}: main={main!r} is not the index of one of {num_tasks} tasks."
        )
