"""Text templates of recipes: `{field}` and `{field[key]}`, nothing else of what format strings can do."""

import string


def check_template(template, name):
    """Field names of a format template, without the indices behind them.

    Raises:
        ValueError: broken braces, fields without a name, attributes or format codes.
    """
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"{name}: broken template {template!r}: {error}") from None
    for _, expression, code, conversion in parts:
        if not expression or code or conversion or "." in expression or expression[0].isdigit():
            raise ValueError(f"{name}: template fields are written {{field}} or {{field[key]}}, got {template!r}")
    return [expression.partition("[")[0] for _, expression, _, _ in parts]
