"""Find the clause: long documents are read in windows, and the answer is quoted from the original.

    python examples/long_contracts.py
    python examples/long_contracts.py lease.txt supplier.txt --query "how can this be ended early" \
        --model Qwen/Qwen3-Reranker-0.6B --max-length 8192 --window-tokens 512

Without files, three agreements of the same boilerplate are compared; what differs stands at their ends, where a reader that cuts
long documents never comes. 'mini', the default, is a small model that ships with the package; it is not Qwen3-Reranker.

Needs, in a clone: pip install ., and the extra `local` for models of the hub.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen_rerank import Document, RankedDocument, Reranker, load_scorer
from qwen_rerank.folders import read_files

BOILERPLATE = (
    "Definitions. In this agreement, Provider means the party that performs the services, Customer means the party that "
    "receives them, and Services means the work described in the schedule attached to this agreement.",
    "Scope. The Provider performs the Services with the skill and care that can be expected of an experienced professional. "
    "Changes to the scope are agreed in writing, together with their effect on price and schedule.",
    "Fees. The Customer pays the fees stated in the schedule within thirty days of a correct invoice. Late payments bear "
    "interest at the statutory rate. Travel expenses are reimbursed at cost against receipts.",
    "Staff. The Provider chooses the people who do the work and may replace them by others of equal qualification. They remain "
    "employees of the Provider, who alone gives them instructions.",
    "Confidentiality. Each party keeps what it learns of the other's business secret and uses it for this agreement alone. "
    "The duty ends five years after the agreement, and does not cover what is public already.",
    "Data. Personal data are processed on documented instructions of the Customer, protected by suitable measures, and deleted "
    "when they are no longer needed. A breach is reported without undue delay.",
    "Intellectual property. Results become the property of the Customer upon full payment. Tools and methods that the Provider "
    "had before remain the Provider's, with a licence for the Customer to use them within the results.",
    "Warranty. Defects that are reported within twelve months of delivery are corrected free of charge. If the correction fails "
    "twice, the Customer may reduce the price.",
    "Liability. Neither party is liable for indirect loss or lost profit. Total liability is limited to the fees of the last "
    "twelve months, except for intent, gross negligence and injury to persons.",
    "Insurance. The Provider keeps a professional liability insurance of at least two million for the term of this agreement "
    "and shows proof of it on request.",
    "Force majeure. No party answers for delay caused by events that it could neither foresee nor avert, such as flood, fire, "
    "war or strikes at third parties. The other party is told at once.",
    "Governing law. This agreement is governed by the law of the Provider's seat, and its courts have jurisdiction. Changes to "
    "this agreement, this clause included, are made in writing.",
)
ENDINGS = {
    "cleaning": "Ending the agreement. It runs for one year. Either party may end it early by written notice of 90 days to "
    "the end of a quarter.",
    "hosting": "Renewal. This agreement runs for three years and is renewed for a year at a time. It cannot be ended early "
    "by the Customer for any reason.",
    "training": "Schedule. Courses take place in the Customer's rooms on the first Monday of every month, for at most twelve "
    "people, who receive a certificate.",
}


def main() -> None:
    """Rank the contracts by their best passage, and quote it; then show what cutting them would have given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "files", type=Path, nargs="*", help="contracts as text, PDF or Word; without any, three samples"
    )
    parser.add_argument("--query", default="can I end the agreement early, and how much notice must I give")
    parser.add_argument("--model", default="mini", help="a hub name, a folder, or 'mini'")
    parser.add_argument("--max-length", type=int, help="tokens of one prompt; without it as many as the model takes")
    parser.add_argument("--window-tokens", type=int, default=96, help="longest window; about a clause reads best")
    arguments = parser.parse_args()

    contracts = read_files(arguments.files).documents if arguments.files else sample_contracts()
    scorer = load_scorer(arguments.model, max_length=arguments.max_length)
    in_windows = Reranker(scorer, long_documents="windows", window_tokens=arguments.window_tokens)
    cut = Reranker(scorer, long_documents="truncate")

    print(f"{arguments.query}   ({arguments.model})\n")
    for hit in in_windows.rerank(arguments.query, contracts):
        print(
            f"{hit.rank}. {hit.document.id}: log-odds {hit.log_odds:.2f}, best of {hit.windows} windows, {place(hit)}"
        )
        print(f"   “{quotation(hit)}”")
    print("\nCut at the end instead:")
    for hit in cut.rerank(arguments.query, contracts):
        print(
            f"{hit.rank}. {hit.document.id}: log-odds {hit.log_odds:.2f}{', its end was not read' if hit.truncated else ''}"
        )


def sample_contracts() -> list[Document]:
    """Return agreements that differ in their last clause alone."""
    return [Document(name, "\n\n".join((*BOILERPLATE, ending))) for name, ending in ENDINGS.items()]


def place(hit: RankedDocument) -> str:
    """Return where in the document the best window lies."""
    start, end = hit.best_window or (0, len(hit.document.text))
    return f"characters {start} to {end} of {len(hit.document.text)}"


def quotation(hit: RankedDocument) -> str:
    """Return the best window on one line; it is a slice of the original text, so it can be highlighted there."""
    start, end = hit.best_window or (0, len(hit.document.text))
    return " ".join(hit.document.text[start:end].split())


if __name__ == "__main__":
    main()
