"""Annual-report excerpts of invented companies, generated from a seed.

A filing is a business paragraph, a table of figures as text and an outlook, optionally followed by sentences without
facts. Figures are consistent: segments add up to revenue, and operating income is revenue less cost of sales and other
expenses.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass


def _words(text: str) -> list[str]:
    return text.split()


_STARTS = _words(
    "Ald Bren Cald Dor Eld Farn Garr Hal Ister Kel Lor Mar Nor Orm Pell Quen Ros Sel Tarn Ulv Ves Wyn Yar Zel"
)
_ENDS = _words(
    "aby bury combe dale enby field gate holm iver keld low mere nick over quist ridge stow thorpe vane wick"
)
# sector: what the company does, and its two segments
_SECTORS = {
    "Freight": ("moves goods by road and rail", "Road", "Rail"),
    "Foods": ("makes chilled meals and bakery products", "Bakery", "Chilled"),
    "Instruments": ("builds measuring instruments for laboratories", "Optics", "Sensors"),
    "Packaging": ("produces paper and glass packaging", "Paper", "Glass"),
    "Marine": ("repairs ships and operates harbour tugs", "Repair", "Towage"),
    "Energy": ("runs wind farms and gas storage sites", "Wind", "Storage"),
    "Textiles": ("weaves fabrics for clothing and furniture", "Apparel", "Furnishing"),
    "Pharma": ("develops vaccines and generic medicines", "Vaccines", "Generics"),
    "Software": ("sells planning software to hospitals and schools", "Health", "Education"),
    "Minerals": ("mines potash and refines copper", "Potash", "Copper"),
    "Tools": ("manufactures hand tools and garden machinery", "Workshop", "Garden"),
    "Airlines": ("flies passengers and cargo between regional airports", "Passenger", "Cargo"),
}
_CITIES = _words(
    "Aarhus Antwerp Basel Bergen Bilbao Bologna Brno Dresden Dundee Galway Genoa Ghent Graz Halifax Izmir "
    "Krakow Leipzig Lille Linz Lyon Malmo Nantes Odense Ottawa Oulu Plymouth Porto Riga Rostock Seville "
    "Tampere Trieste Turin Utrecht Valencia Varna Zagreb Zaragoza"
)
_FIRST_NAMES = _words(
    "Adela Bruno Carmen Dmitri Elena Farid Greta Hugo Ingrid Jonas Kamila Lars Mirela Nadia Oskar Petra "
    "Rafael Sonja Tomas Ursula Viktor Wanda Yusuf Zora"
)
_LAST_NAMES = _words(
    "Abelson Barrowe Castellan Dahlberg Ekstrand Fontaine Grunwald Hollister Ivarsen Jankovic Kessler "
    "Lindqvist Moreau Novotny Okafor Pemberton Quintero Rasmussen Sorensen Tavares Underhill "
    "Valdez Whitlock Yamada"
)
_OUTLOOKS = (
    "the board expects moderate growth in both segments next year.",
    "management plans to hold prices and to reduce stock next year.",
    "demand should recover slowly as customers finish their own inventories.",
    "the company expects higher wages and steady order books next year.",
    "growth will depend on exchange rates and on the price of energy.",
)
_REMARKS = (
    "Order intake was strongest in the second half.",
    "The auditors gave an opinion without reservations.",
    "Weather had little effect on trading.",
    "No single customer accounted for more than a tenth of sales.",
    "The pension plan remains fully funded.",
    "Two leases were renewed on similar terms.",
    "Management considers the level of insurance adequate.",
    "Supplier contracts were renegotiated during the spring, which softened the rise in input costs.",
    "The board proposes an unchanged dividend.",
    "Absence from work fell slightly.",
    "A new planning system went live without interruption to deliveries, and the old one was retired.",
    "Borrowing remained well inside the limits agreed with the banks.",
    "Research spending was in line with the previous year.",
    "Competition stayed intense, especially from imports.",
    "Energy use per unit fell again after the older machines were replaced.",
    "There were no material legal proceedings.",
    "Customers rated service higher than in the year before, mainly because deliveries arrived on time.",
    "Currency effects were small.",
    "Training was offered to every site manager.",
    "The audit committee met as planned.",
    "Stock levels returned to normal.",
    "One small site was closed, and its work was moved to a larger one nearby with little disruption.",
    "Prices of raw materials eased towards the end of the period.",
    "The company made no acquisitions.",
)
_REMARKS_PER_FILING = 12


@dataclass(frozen=True)
class Fact:
    """A question about a filing and its answer, a substring of the filing."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class Filing:
    """Excerpt of a company's annual report, the optional sentences after it, and its facts."""

    title: str
    body: str
    remarks: tuple[str, ...]
    facts: tuple[Fact, ...]


def filings(rng: random.Random) -> Iterator[Filing]:
    """Filings of distinct companies, cities and officers, one per city."""
    stems = rng.sample([start + end for start in _STARTS for end in _ENDS], len(_CITIES))
    officers = rng.sample([f"{first} {last}" for first in _FIRST_NAMES for last in _LAST_NAMES], 2 * len(_CITIES))
    for number, city in enumerate(rng.sample(_CITIES, len(_CITIES))):
        yield _filing(stems[number], city, officers[2 * number], officers[2 * number + 1], rng)


def _filing(stem: str, city: str, chief: str, finance_chief: str, rng: random.Random) -> Filing:
    sector = rng.choice(list(_SECTORS))
    activity, first_segment, second_segment = _SECTORS[sector]
    name, year = f"{stem} {sector}", rng.randint(2015, 2024)
    figures = _figures(rng)
    segments = {first_segment: figures.pop("first"), second_segment: figures.pop("second")}
    employees = f"{rng.randint(1200, 48000):,}"
    # Every row includes the company name: small models need it to find the row.
    lines = [f"{item.capitalize()} of {name} | {amount}" for item, amount in figures.items()]
    lines += [f"Revenue of the {segment} segment of {name} | {amount}" for segment, amount in segments.items()]
    table = "\n".join([f"Figures of {name} | {year}", *lines, f"Employees of {name} at year end | {employees}"])
    body = (
        f"{name}: annual report for {year}\n"
        f"{name} {activity}. {name} is headquartered in {city}. The chief executive officer of {name} is {chief}. "
        f"The chief financial officer of {name} is {finance_chief}.\n"
        f"{table}\n"
        f"Outlook: {rng.choice(_OUTLOOKS)}"
    )
    facts = [
        *(Fact(item, f"What was the {item} of {name} in {year}?", amount) for item, amount in figures.items()),
        *(
            Fact("segment", f"What was the revenue of the {segment} segment of {name} in {year}?", amount)
            for segment, amount in segments.items()
        ),
        Fact("employees", f"How many employees did {name} have at the end of {year}?", employees),
        Fact("city", f"In which city was {name} headquartered in {year}?", city),
        Fact("chief", f"Who was the chief executive officer of {name} in {year}?", chief),
        Fact("finance chief", f"Who was the chief financial officer of {name} in {year}?", finance_chief),
    ]
    remarks = tuple(rng.sample(_REMARKS, _REMARKS_PER_FILING))
    return Filing(f"{name} annual report {year}", body, remarks, tuple(facts))


def _figures(rng: random.Random) -> dict[str, str]:
    """Printed amounts by line item; `first` and `second` are the revenues of the segments."""
    revenue = rng.randint(900, 9800)
    cost = round(revenue * rng.uniform(0.5, 0.7))
    expenses = round(revenue * rng.uniform(0.12, 0.2))
    first = round(revenue * rng.uniform(0.35, 0.65))
    amounts = {
        "revenue": revenue,
        "cost of sales": cost,
        "operating income": revenue - cost - expenses,
        "capital expenditure": round(revenue * rng.uniform(0.04, 0.12)),
        "first": first,
        "second": revenue - first,
    }
    return {item: f"${amount:,} million" for item, amount in amounts.items()}
