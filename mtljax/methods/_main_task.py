"""What methods with one main task share."""


def check_main(name: str, num_tasks: int, main: int) -> None:
    """Raises unless ``main`` is the index of a task."""
    if isinstance(main, bool) or not isinstance(main, int) or not 0 <= main < num_tasks:
        raise ValueError(
            f"{name}: main={main!r} is not the index of one of {num_tasks} tasks."
        )
