"""The words of GenEval's prompts: tasks, colours, positions, number words, articles and plurals."""

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
POSITIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}


def article(noun: str) -> str:
    """The noun phrase with its indefinite article: 'a red circle', 'an orange square'."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """GenEval's plural: 'es' after an s, else 's'."""
    return noun + ("es" if noun.endswith("s") else "s")
