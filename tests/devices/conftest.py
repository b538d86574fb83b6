"""Prints how many combinations of layouts and models JAX itself does not trace."""


def pytest_terminal_summary(terminalreporter):
    skipped = [
        report
        for report in terminalreporter.stats.get("skipped", ())
        if "devices/" in report.nodeid
    ]
    if not skipped:
        return
    terminalreporter.write_line(f"devices: {len(skipped)} combinations left out")
    for report in skipped:
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else ""
        terminalreporter.write_line(
            f"  {report.nodeid.split('::')[-1]}: {reason[:160]}"
        )
