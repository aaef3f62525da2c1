"""`realm index …`: manage the index versions of a run."""

import argparse
from dataclasses import replace

from realm.app.cli.arguments import path_option, seconds
from realm.app.cli.common import open_run
from realm.errors import UserError


def add_index_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommands and their options."""
    index = commands.add_parser(
        "index",
        help="manage the index versions of a run",
        description="Manage the index versions of a run.",
    )
    verbs = index.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command, about in (
        ("ls", _ls, "list all versions with size, creation time and state"),
        ("show", _show, "print the manifest and state of one version as JSON"),
        ("verify", _verify, "check the files of versions against the checksums in their manifests"),
        ("gc", _gc, "remove unused versions and encoders, and leftovers of crashes"),
        ("add", _add, "add documents to the run's corpus, or remove some, and update the newest index"),
    ):
        verb = verbs.add_parser(name, help=about, description=about)
        verb.add_argument("--run", type=path_option, required=True, help="run folder")
        verb.set_defaults(command=command, takes_overrides=True)
        if name == "show":
            verb.add_argument("version", help="name of a version, such as a01-step-000500-e3")
        if name == "verify":
            verb.add_argument("version", nargs="*", help="names such as a01-step-000500-e3 (default: all versions)")
        if name == "add":
            verb.add_argument(
                "documents", nargs="*", help="files or folders of documents, or mappings as in corpus.passages"
            )
            verb.add_argument("--format", help="format of the documents (default: auto-detected)")
            verb.add_argument(
                "--delete",
                type=path_option,
                metavar="FILE",
                help="file with the ids of documents to remove, one per line",
            )
            verb.add_argument(
                "--replace", action="store_true", help="added documents replace existing ones with the same id"
            )
            verb.add_argument("--skip-bad", action="store_true", help="skip and count records that cannot be used")
        if name == "gc":
            verb.add_argument(
                "--grace",
                type=seconds,
                metavar="S",
                help="seconds that processes have to pin a version before it is removed (default: refresh.grace_s)",
            )
            verb.add_argument("--dry-run", action="store_true", help="print what would be removed, and remove nothing")


def _ls(options: argparse.Namespace) -> None:
    from index.admin import list_versions
    from realm.runtime.telemetry import print_table

    rows = [
        [
            info.path.relative_to(options.run).as_posix(),
            info.manifest and f"{info.manifest.count:,}",
            info.manifest and info.manifest.factory + (" + BM25" if info.manifest.lexical else ""),
            f"{info.bytes / 2**20:,.1f}",
            info.manifest and info.manifest.created_at,
            info.state,
        ]
        for info in list_versions(open_run(options).folder)
    ]
    print_table(
        f"Index versions of {options.run}", ["version", "passages", "factory", "MiB", "created (UTC)", "state"], rows
    )


def _show(options: argparse.Namespace) -> None:
    import json
    from dataclasses import asdict

    from index.admin import find_version

    info = find_version(open_run(options).folder, options.version)
    if info.manifest is None:
        raise UserError(
            f"{info.path} has no readable manifest; `realm index verify` prints the reason, and the refresher rebuilds "
            "the version."
        )
    everything = {**asdict(info.manifest), "bytes": info.bytes, "state": info.state, "readers": info.readers}
    print(json.dumps(everything, indent=1))


def _verify(options: argparse.Namespace) -> None:
    from index.admin import find_version, list_versions, verify
    from realm.runtime.telemetry import console

    folder = open_run(options).folder
    chosen = [find_version(folder, name) for name in options.version] or list_versions(folder)
    broken = [info for info in chosen if verify(info, console.print) is not None]
    if broken:
        raise UserError(
            f"{len(broken)} of {len(chosen)} index versions are broken and would be refused; remove them, "
            "and the refresher will rebuild them."
        )


def _gc(options: argparse.Namespace) -> None:
    from index.admin import collect_garbage
    from realm.runtime.telemetry import console

    run = open_run(options)
    grace_s = run.config.refresh.grace_s if options.grace is None else options.grace
    removed = collect_garbage(run.folder, run.config.refresh, grace_s, options.dry_run, console.print)
    for path in removed:
        console.print(f"{'would remove' if options.dry_run else 'removed'} {path}")
    if not removed:
        console.print("nothing to remove")


def _add(options: argparse.Namespace) -> None:
    from realm.app.corpus import add_documents
    from realm.corpus.sources import SourceConfig
    from realm.corpus.text_files import read_names
    from realm.run.config_file import parse_section

    sources = [parse_section(SourceConfig, text, "documents") for text in options.documents]
    if options.format is not None:
        sources = [replace(source, format=options.format) for source in sources]
    delete = [] if options.delete is None else read_names(options.delete)
    if not sources and not delete:
        raise UserError("no documents to add or remove; give files of documents, or a file of ids with --delete.")
    add_documents(open_run(options), sources, delete, options.replace, options.skip_bad)
