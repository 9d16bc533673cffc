"""`steerfm report`: look at a comparison's page, write it as files for a paper, or publish it to W&B."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

from rich.console import Console

from steerfm.runs import Run, find_run

console = Console(highlight=False)


def run(arguments: argparse.Namespace) -> int:
    """Show, export or publish one."""
    actions = {"show": _show, "export": _export, "publish": _publish}
    return actions[arguments.action](arguments)


def _show(arguments: argparse.Namespace) -> int:
    """Serve the page to this machine until a signal comes."""
    from steerfm.report.serve import PageServer, open_browser, page_of

    page = page_of(arguments.run, arguments.root)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # both signals end it in the same way
    try:
        with PageServer(page, arguments.port) as server:
            _say(f"{page} is at {server.address} (Ctrl-C ends it)")
            if arguments.browser:
                open_browser(server.address)
            server.serve_forever()
    except KeyboardInterrupt:
        _say("Stopped.")
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    """Read the compared runs again and write the files."""
    from steerfm.report.export import export
    from steerfm.report.reopen import changed, reopen

    comparison = Run.open(arguments.run, arguments.root)
    folder = Path(arguments.folder or Path("export") / comparison.info.name)
    with console.status("Reading the runs again"):
        found = reopen(comparison)
        written = export(found, folder, arguments.format, prompts=arguments.prompts, seeds=arguments.seeds)
    for name in changed(comparison):
        _say(f"warning: {name} has changed since it was compared; what is written is of what is there now.", "yellow")
    for path in written:
        _say(str(path))
    return 0


def _publish(arguments: argparse.Namespace) -> int:
    """Send a comparison that is kept in a folder to W&B, and print where it is."""
    from steerfm.report.published import publish

    folder = find_run(arguments.run, arguments.root)
    _say(publish(folder, project=arguments.project, entity=arguments.entity))
    return 0


def _say(text: str, style: str | None = None) -> None:
    console.print(text, style=style, markup=False, soft_wrap=True)
