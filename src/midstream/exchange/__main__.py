"""`python -m midstream.exchange import|export`: one request, as JSON, on standard input."""

import json
import sys

from pydantic import ValidationError


def main(arguments: list[str]) -> int:
    """Import or export; an error that the user can put right is one line and exit code 2."""
    if arguments not in (["import"], ["export"]):
        print("error: say import or export", file=sys.stderr)
        return 2
    try:
        request = json.load(sys.stdin)
        if arguments == ["import"]:
            from midstream.exchange.import_model import serve
        else:
            from midstream.exchange.export import serve
        serve(request)
    except ValidationError as error:
        wrong = [
            f"{'.'.join(map(str, item['loc'])) or 'request'}: {item['msg']}"
            for item in error.errors()
        ]
        print(f"error: {'; '.join(wrong)}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
