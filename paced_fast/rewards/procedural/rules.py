"""Rule for each task of reasoning-gym: our own, or the package's checker in a sandbox.

Our own rules compare texts, short numbers and formulas. They evaluate nothing and take time proportional to the length
of the text, so they run in the trainer. All other checkers parse model output and run in processes that can be killed.

The package gives points to some absurd texts: `nan` for any complex number, any text for a board that halts, `0` for a
coin's 0.03, another problem's answer for nine cells in ten, the prompt for a factorization. Such tasks have our own
rule here, or only full marks count (`least`). Points for form alone are at most 0.05 and never count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from paced_fast.rewards.math.formulas import is_formula, is_integral, is_sum
from paced_fast.rewards.procedural import plain
from paced_fast.rewards.procedural.dress import dressed
from paced_fast.rewards.procedural.plain import Judge

FORM_ALONE = 0.05
"""Highest score that reasoning-gym gives to any text of the right form; scores up to it count as 0."""
_FULL = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """Rule of one task."""

    judge: Judge | None = None
    """Our own rule, run in the trainer; None for the package's checker, run in a sandbox."""
    least: float = FORM_ALONE
    """Threshold that a checker's score must exceed to count; 1: only full marks count."""
    is_readable: Callable[[str], bool] | None = None
    """Predicate for reference answers that the rule can read; rows with other answers are judged all the same."""
    refused: str = ""
    """Reason why the task is refused, with the remedy; "" if it is not."""

    @property
    def needs_sandbox(self) -> bool:
        """True if code of the package reads the text."""
        return self.judge is None and not self.refused

    def score(self, checked: float) -> float:
        """Return the reward for a checker's score."""
        if self.least >= _FULL:
            return float(checked >= _FULL)
        return checked if checked > self.least else 0.0


def rule_of(task: str) -> Rule:
    """Return the rule of a task; for a task without one, a rule that refuses it."""
    return RULES.get(task) or Rule(
        refused="it was not tried with absurd answers, and its checker may pass anything: score it by a function of "
        "your own, reward=file.py:function"
    )


def _integral(text: str, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    facts = entry["metadata"]
    return float(is_integral(text, facts["integrand"], facts["variable"]))


def _product(text: str, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    return float(is_sum(text, str(entry["answer"])))


def _rules() -> dict[str, Rule]:
    contained = (
        "acre aiw arc_1d base_conversion basic_arithmetic bf binary_alternation caesar_cipher count_bits count_primes "
        "course_schedule gcd isomorphic_strings largest_island lcm leg_counting letter_counting list_functions "
        "mahjong_puzzle maze modulo_grid number_filtering number_sequence ransom_note rotate_matrix rotten_oranges "
        "simple_equations simple_geometry string_manipulation string_splitting string_synthesis syllogism "
        "word_sequence_reversal"
    )
    own: dict[str, Judge] = dict.fromkeys(contained.split(), plain.contained)
    own |= dict.fromkeys(("chain_sum", "products"), plain.contained_number)
    own |= {"tsumego": plain.contained_upper, "manipulate_matrix": plain.contained_rows}
    own |= dict.fromkeys(("ab", "self_reference", "circuit_logic", "emoji_mystery"), plain.same_by(str.strip))
    folded = "color_cube_rotation family_relationships game_of_life_halting spell_backward"
    own |= dict.fromkeys(folded.split(), plain.same_by(lambda text: text.strip().lower()))
    own |= dict.fromkeys(("dice", "zebra_puzzles"), plain.same_by(lambda text: text.lower().replace("\n", "")))
    own |= dict.fromkeys(("needle_haystack", "figlet_font"), plain.same_by(lambda text: text.replace(" ", "").lower()))
    own["path_star"] = plain.same_by(str.split)
    own |= dict.fromkeys(("sentence_reordering", "letter_jumble"), plain.same_by(lambda text: text.lower().split()))
    own["word_sorting"] = plain.same_by(lambda text: [word.strip() for word in text.split(",")])
    own |= dict.fromkeys(("decimal_chain_sum", "rectangle_count"), plain.same_number)
    own |= {
        "decimal_arithmetic": plain.near_in_places, "number_format": plain.near_hundredth,
        "power_function": plain.three_figures, "gsm_symbolic": plain.first_number,
        "bitwise_arithmetic": plain.hexadecimal, "coin_flip": plain.chance, "complex_arithmetic": plain.complex_number,
        "fraction_simplification": plain.fraction, "calendar_arithmetic": plain.calendar,
        "number_sorting": plain.sorted_numbers, "game_of_life": plain.same_json,
        "countdown": plain.arithmetic("target"), "puzzle24": plain.arithmetic(24),
    }  # fmt: skip
    own |= dict.fromkeys(("sudoku", "mini_sudoku", "futoshiki"), plain.digits)
    own["string_insertion"] = plain.or_list("".join, 0.1)
    own["spiral_matrix"] = plain.or_list(lambda items: " ".join(map(str, items)), 0.1)
    own["binary_matrix"] = plain.or_list(plain.matrix, 0.1)
    own["n_queens"] = plain.or_list(plain.matrix, 0.5, "valid_answers")
    own |= dict.fromkeys(("arc_agi", "rearc", "survo"), plain.same_by(plain.rows))
    own |= {"palindrome_generation": plain.palindrome, "prime_factorization": plain.factors}
    own |= {"pool_matrix": plain.near_matrix, "group_anagrams": plain.same_groups("solution", in_any_order=True)}
    own["palindrome_partitioning"] = plain.same_groups("solution", in_any_order=False)
    own |= {"polynomial_multiplication": _product, "knights_knaves": plain.assignments}
    by_share = (
        "tsumego manipulate_matrix chain_sum products sentence_reordering letter_jumble word_sorting knights_knaves"
    )
    own |= {task: dressed(own[task]) for task in f"{contained} {by_share}".split()}
    in_full = "game_of_life_halting countdown puzzle24 fraction_simplification survo spell_backward"
    own |= {task: dressed(own[task], in_full=True) for task in in_full.split()}
    # The package could not solve some of its integrals; their answers are unevaluated integrals.
    integrals = "intermediate_integration simple_integration"
    checked = (
        "advanced_geometry boxnet codeio cryptarithm graph_color jugs kakurasu knight_swap quantum_lock rubiks_cube "
        "rush_hour shortest_path sokoban tower_of_hanoi word_ladder"
    )
    full = "polynomial_equations propositional_logic time_intervals"
    return {
        **{task: Rule(judge=judge) for task, judge in own.items()},
        **{task: Rule() for task in checked.split()},
        **{task: Rule(least=_FULL) for task in full.split()},
        **{task: Rule(judge=dressed(_integral, in_full=True), is_readable=is_formula) for task in integrals.split()},
        "composite": Rule(refused="it is a mixture of other tasks: name each of them as a source, with its share"),
    }


RULES: Mapping[str, Rule] = _rules()
"""Rule of every task of reasoning-gym 0.1.25."""
