"""--columns, as the stages and convert_dataset.py read it; as light as a script that loads no library."""

from stagewise.errors import InputError


def parse_columns(text: str | None) -> tuple[tuple[str, str], ...]:
    """(key, column of the file) pairs: "question=Question" is (("question", "Question"),). A column may hold a "=".

    Raises InputError where it is written otherwise, or names a key or a column twice.
    """
    if text is None:
        return ()
    pairs = []
    for part in text.split(","):
        key, _, column = map(str.strip, part.partition("="))
        if not key or not column:
            raise InputError(
                f"--columns: found {part.strip()!r} in {text!r}, expected key=column, such as question=Question,"
                "answer=Response"
            )
        pairs.append((key, column))
    for names, what in ((tuple(key for key, _ in pairs), "key"), (tuple(column for _, column in pairs), "column")):
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise InputError(f"--columns: found the {what} {twice!r} twice in {text!r}, expected each once")
    return tuple(pairs)
