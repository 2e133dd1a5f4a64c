"""The data side of an XTuner config: data sets, template, length and packing. Lesson: notebook 08."""

from __future__ import annotations

from typing import Any

from minituner.catalog.lookup import load
from minituner.data.formats_table import FORMATS
from minituner.migrate.folding import Call, Config
from minituner.migrate.report import Imported, Row, short
from minituner.migrate.structure import at, first, named, whole


def datasets(config: Config) -> list[Any]:
    """The data sets of a config, ConcatDataset taken apart."""
    top = first(config, ("train_dataloader", "dataset"), "train_dataset")
    if named(at(top, "type")) == "ConcatDataset":
        inner = at(top, "datasets")
        return list(inner) if isinstance(inner, list | tuple) else []
    return [] if top is None else [top]


def carry_data(config: Config, out: Imported) -> None:
    sets = datasets(config)
    sources = [source for number, one in enumerate(sets) if (source := _source(one, number, out))]
    if not sources:
        sources = [{"path": "data/train.json", "format": "auto"}]
        out.leave("train_dataset", "no data set in it can be read; set data.sources in the recipe")
    out.values.setdefault("data", {})["sources"] = sources
    whole_set: Any = sets[0] if sets else None
    template = at(whole_set, "template_map_fn", "template")
    template = config.values.get("prompt_template") if template is None else template
    key = named(template)
    if key and key in load("templates"):
        out.put("data.template", key, f"prompt_template = PROMPT_TEMPLATE.{key}")
    elif template is not None:
        out.put(
            "data.template",
            "native",
            f"prompt_template = {short(template)}",
            "changed",
            "no such template here; native is the tokenizer's own (minituner list-templates)",
        )
    length = at(whole_set, "max_length")
    packed = "max_length" in out.values["data"]  # as the packs of tokenised files say
    length = config.values.get("max_length") if length is None and not packed else length
    if isinstance(length, int):
        out.put("data.max_length", length, f"max_length = {length}")
    packs = at(whole_set, "pack_to_max_length")
    packs = config.values.get("pack_to_max_length") if packs is None else packs
    varlen = at(config.values, "model", "use_varlen_attn")
    varlen = bool(config.values.get("use_varlen_attn") if varlen is None else varlen)
    if packs is False:
        out.put("data.packing", "none", "pack_to_max_length = False")
        if varlen:
            out.leave(
                "use_varlen_attn = True",
                "without packing a row holds one record, so there is nothing to keep apart (XTuner stops here)",
                "not needed",
            )
    else:
        out.put(
            "data.packing",
            "best_fit",
            "pack_to_max_length = True",
            "changed",
            "no record is cut in two; data.packing=concat cuts anywhere, as XTuner did",
        )
        out.put(
            "data.isolate_documents",
            True,
            f"use_varlen_attn = {varlen}",
            "carried" if varlen else "changed",
            "" if varlen else "packed records saw each other; here they never do (on every device)",
        )
    if at(whole_set, "shuffle_before_pack") is False:
        out.leave(
            "shuffle_before_pack = False", "packs are drawn in a seeded order; data.shuffle=false keeps it", "changed"
        )


def _source(one: Any, number: int, out: Imported) -> dict[str, Any] | None:
    """One data set of XTuner as one source, or None with the reason said."""
    kind, name = named(at(one, "type")), f"dataset {number + 1}"
    tokenized = one if at(one, "dataset_cfg") is None else at(one, "dataset_cfg")
    if named(at(tokenized, "type")) == "load_intern_repo_tokenized_dataset":
        return _tokenized(tokenized, one, name, out)
    if kind in ("MOSSSFTDataset", "LLaVADataset") or "intern" in kind:
        out.leave(f"{name}: {kind}", "this kind of data set is not read; name its files in data.sources")
        return None
    inner = at(one, "dataset")
    path, files = at(inner, "path"), at(inner, "data_files")
    if isinstance(files, dict | Call):
        files = at(files, "train") or next(iter((files.named if isinstance(files, Call) else files).values()), None)
    if isinstance(files, list | tuple):
        if len(files) > 1:
            out.leave(
                f"{name}: data_files = {short(files)}", "only the first file is taken; add the others to data.sources"
            )
        files = files[0] if files else None
    place = files if path in ("json", "csv", "text", "parquet", None) else path
    if not isinstance(place, str):
        place = at(inner, "dataset_path") or at(inner, "dataset_id")  # load_from_disk, MsDataset.load
    if not isinstance(place, str) or not place:
        out.leave(f"{name}: {short(inner)}", "where its data is cannot be read from the config")
        return None
    source: dict[str, Any] = {"path": place}
    map_fn = at(one, "dataset_map_fn")
    key = (map_fn if isinstance(map_fn, str) else named(map_fn)).removesuffix("_map_fn")
    aliases = {alias: entry.name for entry in FORMATS.values() for alias in (entry.name, *entry.aliases)}
    why = ""
    if key in aliases:
        source["format"] = aliases[key]
    else:
        source["format"] = "auto"
        why = f"{short(map_fn)} is not a format here: auto looks at the records" if map_fn is not None else ""
    if limit := at(one, "max_dataset_length"):
        source["limit"] = whole(limit, 1)
    if isinstance(split := at(inner, "split"), str) and split.isidentifier():
        source["split"] = split
    elif split is not None:
        out.leave(
            f"{name}: split = {short(split)}", "for a part of a split take data.sources.N.limit, drawn by the seed"
        )
    out.rows.append(_row(name, place, source, why))
    if subset := at(inner, "name"):
        out.leave(f"{name}: name = {short(subset)}", "hub subsets are not reached; download it and name the files")
    return source


def _tokenized(cfg: Any, packed: Any, name: str, out: Imported) -> dict[str, Any] | None:
    """A folder of InternEvo's `.bin` files, whose packs get the length that `build_packed_dataset` was told."""
    folder = at(cfg, "folder")
    if not isinstance(folder, str) or not folder:
        out.leave(f"{name}: folder = {short(folder)}", "where its data is cannot be read from the config")
        return None
    source = {"path": folder, "format": "tokenized"}
    out.rows.append(_row(name, folder, source, ""))
    if isinstance(length := at(packed, "packed_length"), int):
        out.put("data.max_length", length, f"{name}: packed_length = {length}")
    if shortest := at(cfg, "min_length"):
        out.leave(f"{name}: min_length = {short(shortest)}", "shorter samples are used too")
    if order := at(cfg, "data_order_path"):
        out.leave(f"{name}: data_order_path = {short(order)}", "all files of the folder are read, sorted")
    return source


def _row(name: str, place: str, source: dict[str, Any], why: str) -> Row:
    new = f"data.sources: {source['path']} ({source['format']})"
    return Row("changed" if why else "carried", f"{name}: {short(place, 40)}", new, why)
