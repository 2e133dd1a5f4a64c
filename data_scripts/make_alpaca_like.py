"""Write invented records in the alpaca layout, as many as a benchmark needs, with lengths like the real ones.

What the time of preparing data depends on is how many records there are and how long each is. Instruction data is
log-normal: most answers have one or two sentences, a few fill pages. So the number of words of each part is drawn, and
then filled with sentences from word lists. The text means nothing; its words are as unevenly frequent as in a language
(Zipf's law), because tokenizers are fast on words that they have just seen:

    tokens       share of the records       (instruction, input and answer; no template; SmolLM2's tokenizer)
      0 to  49   ███████████ 18%
     50 to  99   ████████████████████████ 40%            median 87
    100 to 199   ████████████████ 27%
    200 to 399   ███████ 11%
    400 and up   ██ 3%                                   one in a hundred has more than 620, the longest 2,300

The seed decides everything: the same arguments always write the same bytes. Records are written one by one, so memory
does not grow with their number. Only the standard library is used:

    python data_scripts/make_alpaca_like.py --records 50000 --out data/alpaca_like.jsonl

Lesson: notebook 04 (packing needs realistic lengths).
"""

from __future__ import annotations

import argparse
import errno
import itertools
import json
import os
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

Record = dict[str, str]

EXAMPLE = "python data_scripts/make_alpaca_like.py --records 50000 --out data/alpaca_like.jsonl"
ZH_SHARE = 0.1
INPUT_SHARE = 0.4  # of the records that have an `input`
LONGEST = 600  # words of one part
# (median words, sigma) of each part's log-normal length
LENGTHS = {"instruction": (11, 0.4), "input": (12, 0.9), "output": (34, 1.0)}

LITTLE = (
    "the of and to a in is for that it with as on are be by this from or an at which can was their will has more when "
    "we into its other also these may than such between some one most used only about if through over each after two"
)
STEMS = (
    "river garden market engine letter window mountain teacher bridge kitchen forest signal harbor machine village "
    "lesson number colour winter summer paper table journey doctor farmer island library music planet question recipe "
    "season shadow station story student system theory traffic valley weather accept answer arrange balance borrow "
    "build carry change collect compare connect cover create deliver describe develop divide examine explain follow "
    "gather improve include increase measure notice observe offer order paint plant prepare present produce protect "
    "provide reduce repair repeat report select separate support travel turn ancient bright careful common curious "
    "distant early gentle heavy hidden honest local modern narrow patient quiet rapid simple steady strange useful warm"
)
ENDINGS = "s ed ing er ly ness able ful less"
SYLLABLES = "ba cor den fel gar hin jo kal lum mar nor pel qui ras sol tam ur ven wil zan"
ZH_LITTLE = "的 是 和 在 了 有 与 为 对 中 可以 我们 这 也 以及 通过 一个 需要 会 使"
ZH_STEMS = (
    "河流 花园 市场 机器 信件 窗户 山脉 老师 桥梁 厨房 森林 信号 港口 村庄 课程 数字 "
    "颜色 冬天 夏天 纸张 旅行 医生 农民 岛屿 图书馆 音乐 行星 问题 菜谱 季节 影子 车站 "
    "故事 学生 系统 理论 交通 山谷 天气 接受 回答 安排 平衡 建造 改变 收集 比较 连接 "
    "覆盖 创造 描述 发展 解释 跟随 提高 包括 增加 测量 注意 观察 提供 绘画 种植 准备 "
    "介绍 生产 保护 减少 修理 重复 报告 选择 分开 支持 古老 明亮 仔细 常见 遥远 温和 "
    "沉重 安静 简单 稳定 奇怪 有用 温暖 健康 环境 方法 时间 社会 文化 经济 历史 科学 "
    "技术 语言 数据 模型 训练 学习"
)


class WrongUsage(ValueError):
    """The arguments cannot be used; the text says what, why and how to fix it."""

    def __init__(self, what: str, *, why: str, fix: str) -> None:
        super().__init__(f"{what}\n  why:  {why}\n  fix:  {fix}")


@dataclass(frozen=True)
class Language:
    """Words with their frequencies, and how sentences are written."""

    words: list[str]
    cum_weights: list[float]
    space: str
    comma: str
    stop: str
    verbs: tuple[str, ...]
    """How an instruction begins."""
    length: float = 1.0
    """Words for each English word; a Chinese word costs more tokens."""

    def sentences(self, rng: random.Random, num_words: int) -> str:
        """Exactly `num_words` words, in sentences; long texts are in paragraphs or numbered."""
        words = rng.choices(self.words, cum_weights=self.cum_weights, k=num_words)
        numbered = num_words > 60 and rng.random() < 0.3
        parts: list[str] = []
        at = 0
        while at < num_words:
            end = min(at + rng.randint(5, 20), num_words)
            half = (at + end) // 2
            text = self.space.join(words[at:half])
            text += (self.comma if at < half else "") + self.space.join(words[half:end]) + self.stop
            parts.append(f"{len(parts) + 1}. {text}" if numbered else text[0].upper() + text[1:])
            at = end
        if numbered:
            return "\n".join(parts)
        if len(parts) < 8:
            return self.space.join(parts)
        paragraphs = [self.space.join(parts[i : i + 5]) for i in range(0, len(parts), 5)]
        return "\n\n".join(paragraphs)


def _zipf(words: Iterable[str]) -> tuple[list[str], list[float]]:
    """The words, most frequent first, and their summed weights, (rank + 3) ** -1.3.

    Language has an exponent near 1. It is steeper here because the rare words are invented and cost more tokens than
    real ones; this keeps English near 1.5 tokens a word.
    """
    unique = list(dict.fromkeys(words))
    return unique, list(itertools.accumulate((rank + 3) ** -1.3 for rank in range(len(unique))))


def languages() -> dict[str, Language]:
    """English and Chinese: frequent little words first, then stems, then rare compounds and invented names."""
    rng = random.Random("alpaca-like")  # noqa: S311 - the order of rare words, not secrets
    stems, zh_stems = STEMS.split(), ZH_STEMS.split()
    endings = [stem + ending for ending in ENDINGS.split() for stem in stems]
    syllables = SYLLABLES.split()
    rare = ["".join(parts).capitalize() for n in (2, 3) for parts in itertools.product(syllables, repeat=n)]
    rare += [str(number) for number in range(2, 2100, 7)]
    zh_rare = [first + second for first in zh_stems for second in zh_stems if first != second]
    for words in (endings, rare, zh_rare):
        rng.shuffle(words)
    en_verbs = ("Describe", "Explain", "List", "Write about", "Compare", "Summarise", "Rewrite", "Give an example of")
    zh_verbs = ("描述", "解释", "列出", "写一写", "比较", "总结", "改写", "举例说明")
    return {
        "en": Language(*_zipf([*LITTLE.split(), *stems, *endings, *rare]), " ", ", ", ".", en_verbs),
        "zh": Language(*_zipf([*ZH_LITTLE.split(), *zh_stems, *zh_rare]), "", "，", "。", zh_verbs, 0.5),
    }


def records(count: int, seed: int = 42, zh_share: float = ZH_SHARE) -> Iterator[Record]:
    """Yield `count` records `{"instruction", "input", "output"}`; `zh_share` of them are Chinese.

    Raises: WrongUsage, for a count below 1 or a share that is none.
    """
    if count < 1:
        raise WrongUsage(f"--records {count}", why="there is nothing to write", fix="give a number from 1 up")
    if not 0 <= zh_share <= 1:
        raise WrongUsage(f"--zh-share {zh_share}", why="it is a share of the records", fix="give 0 to 1")
    return _records(count, seed, zh_share)


def _records(count: int, seed: int, zh_share: float) -> Iterator[Record]:
    rng = random.Random(f"alpaca-like-{seed}")  # noqa: S311 - invented text, not secrets
    tongues = languages()
    for _ in range(count):
        language = tongues["zh" if rng.random() < zh_share else "en"]
        verb = rng.choice(language.verbs)
        task = language.sentences(rng, _length(rng, "instruction", language))
        has_input = rng.random() < INPUT_SHARE
        yield {
            "instruction": f"{verb}{language.space}{task[0].lower()}{task[1:]}",
            "input": language.sentences(rng, _length(rng, "input", language)) if has_input else "",
            "output": language.sentences(rng, _length(rng, "output", language)),
        }


def _length(rng: random.Random, part: str, language: Language) -> int:
    """Words of one part, 1 to LONGEST."""
    median, sigma = LENGTHS[part]
    return max(1, min(LONGEST, round(language.length * median * rng.lognormvariate(0, sigma))))


def write(rows: Iterable[Record], out: Path) -> int:
    """Write the rows as JSON lines and return how many; the file appears complete or not at all. Raises: OSError."""
    if out.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder, not a file", str(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    written = 0
    try:
        with aside.open("w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                written += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)  # still there only if something failed
    return written


class Parser(argparse.ArgumentParser):
    """argparse, with the fix under the message."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and a command that works; exit with 2."""
        why = "the command line could not be understood (--help lists the options)"
        self.exit(2, f"{WrongUsage(message, why=why, fix=EXAMPLE)}\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 0 (written), 1 (could not be written) or 2 (wrong usage)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # an old console must not fail on a Chinese name
    parser = Parser(description="Write invented records in the alpaca layout, with realistic lengths.")
    parser.add_argument("--records", default=50_000, type=int, help="how many (default: 50000)")
    parser.add_argument("--out", required=True, type=Path, help="the JSON-lines file to write")
    parser.add_argument("--zh-share", default=ZH_SHARE, type=float, help=f"share in Chinese (default: {ZH_SHARE})")
    parser.add_argument("--seed", default=42, type=int, help="decides everything (default: 42)")
    args = parser.parse_args(argv)
    try:
        written = write(records(args.records, args.seed, args.zh_share), args.out)
    except WrongUsage as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"could not write {args.out}: {error.strerror or error}\n"
            "  why:  the folder or the disk refused it\n"
            "  fix:  choose a file with --out in a folder that you may write to, with free space",
            file=sys.stderr,
        )
        return 1
    print(f"wrote {written} records ({args.out.stat().st_size / 1e6:.1f} MB) to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
