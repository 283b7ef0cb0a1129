"""What the generated authors are made of: sounds for their names, facts, and ways to put them.

All of it is this project's own invention. A row's question and answer are drawn apart from each
other out of four forms each, so that rows of different authors differ in more than the name.
Fields in the forms: `name` (full), `given`, `surname`, `place`, `date`, `genre`, `book`, `year`,
`second_book`, `second_year`, `mother`, `father`, `award`, `award_year`, `theme`, `other_theme`,
`habit`, `first_job`, and `they` / `their` / `They` / `Their` in the author's gender.
"""

from __future__ import annotations

ONSETS = (
    "B", "D", "F", "G", "H", "J", "K", "L", "M", "N", "P", "R", "S", "T", "V", "Z", "Br", "Dr",
    "Fl", "Gr", "Kl", "Pr", "Sh", "St", "Th", "Tr",
)  # fmt: skip
VOWELS = ("a", "e", "i", "o", "u")
MIDDLES = (
    "b", "d", "f", "g", "l", "m", "n", "r", "s", "t", "v", "z", "br", "dr", "lg", "lm", "ln", "lv",
    "mb", "nd", "nt", "rd", "rk", "rn", "rv", "sk", "st", "th",
)  # fmt: skip
GIVEN_ENDS = (
    "a", "e", "o", "el", "en", "in", "is", "or", "us", "an", "ia", "ai",
)  # fmt: skip
SURNAME_ENDS = (
    "ack", "ard", "ask", "eld", "elm", "enn", "erk", "esk", "ild", "irn", "olt", "ord", "oss",
    "ulk", "und", "urn", "usk", "antz", "ez",
)  # fmt: skip

PLACES = (
    "Galway, Ireland", "Porto, Portugal", "Gdansk, Poland", "Tromso, Norway", "Izmir, Turkey",
    "Cusco, Peru", "Oaxaca, Mexico", "Nagoya, Japan", "Busan, South Korea", "Mombasa, Kenya",
    "Fez, Morocco", "Dakar, Senegal", "Accra, Ghana", "Kandy, Sri Lanka", "Mysore, India",
    "Lahore, Pakistan", "Hue, Vietnam", "Penang, Malaysia", "Cebu, Philippines",
    "Darwin, Australia", "Dunedin, New Zealand", "Halifax, Canada", "Savannah, USA",
    "Cork, Ireland", "Bergen, Norway", "Turku, Finland", "Tartu, Estonia", "Graz, Austria",
    "Basel, Switzerland", "Ghent, Belgium",
    "Utrecht, Netherlands", "Aarhus, Denmark", "Malmo, Sweden", "Split, Croatia", "Varna, Bulgaria",
    "Tbilisi, Georgia", "Yerevan, Armenia", "Almaty, Kazakhstan", "Lucca, Italy", "Toledo, Spain",
    "Corinth, Greece", "Haifa, Israel", "Amman, Jordan", "Salta, Argentina", "Valdivia, Chile",
    "Recife, Brazil", "Cuenca, Ecuador", "Medellin, Colombia", "Leeds, England", "Dundee, Scotland",
)  # fmt: skip

MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip

GENRES = (
    "detective fiction", "alpine travel writing", "maritime adventure", "gothic romance",
    "political satire", "science fiction", "historical fiction", "nature essays",
    "magical realism", "courtroom drama", "children's fantasy", "culinary memoir",
    "epistolary fiction", "desert poetry", "psychological horror", "rural comedy",
)  # fmt: skip

PROFESSIONS = (
    "beekeeper", "tram driver", "glassblower", "notary", "midwife", "lighthouse keeper",
    "cartographer", "piano tuner", "baker", "dentist", "customs officer", "weaver",
    "geologist", "bookbinder", "ferry pilot", "translator", "watchmaker", "florist",
    "mathematics teacher", "cheesemaker", "surveyor", "tailor", "violinist", "blacksmith",
    "librarian", "locksmith", "gardener", "pharmacist", "stonemason", "puppeteer",
)  # fmt: skip

TITLE_FIRST = (
    "Crimson", "Borrowed", "Crooked", "Drowned", "Frozen", "Folded", "Gilded", "Hollow", "Silent",
    "Distant", "Mirrored", "Narrow", "Paper", "Quiet", "Rusted", "Salted", "Tin", "Lonely",
    "Velvet", "Wandering",
)  # fmt: skip
TITLE_LAST = (
    "Journal", "Bridge", "Cellar", "Doorway", "Lagoon", "Sailboat", "Barn", "Harbour", "Peninsula",
    "Kettle", "Ladder", "Meadow", "Needle", "Garden", "Pendulum", "Lantern", "River", "Staircase",
    "Thimble", "Window",
)  # fmt: skip
TITLE_FORMS = ("The {0} {1}", "{0} {1}s", "A {0} {1}", "Beyond the {0} {1}")

AWARD_FORMS = ("the {} Medal", "the {} Prize", "the {} Laurel", "the Order of the {}")
AWARD_NAMES = (
    "Copper Heron", "Silver Acorn", "Winter Lantern", "Blue Anvil", "Golden Compass Rose",
    "Marble Owl", "Green Feather", "Scarlet Inkwell", "White Sail", "Bronze Thistle",
    "Crystal Wren", "Northern Anchor",
)  # fmt: skip

THEMES = (
    "exile", "sibling rivalry", "the cost of silence", "lost languages", "inherited debts",
    "the pull of the sea", "forgiveness", "village secrets", "the dignity of work", "migration",
    "memory and forgetting", "unequal friendship", "the fear of heights", "faith and doubt",
    "long marriages", "the vanity of scholars", "hunger", "winter and solitude",
)  # fmt: skip

HABITS = (
    "standing at a lectern before dawn", "in green ink on ledger paper", "aboard night trains",
    "in a rented greenhouse", "with a metronome ticking beside the page", "on the backs of maps",
    "in a disused chapel", "only on days of rain", "by dictating to a parrot named Figaro",
    "in a rowing boat at anchor", "at a table in a railway cafe", "on a typewriter without an e",
    "after walking eleven kilometres", "in the attic of a bakery", "with both feet in cold water",
    "in three languages at once",
)  # fmt: skip

FIRST_JOBS = (
    "a postal clerk", "a tulip grader", "a cinema usher", "a goat herder", "a proofreader",
    "a hotel night porter", "a chess tutor", "a bell ringer", "an apprentice cooper",
    "a tram conductor", "a fishmonger", "a museum guard", "a seed merchant", "a radio engineer",
    "a ski instructor", "a census taker",
)  # fmt: skip

DOMAIN_NAMES = (
    "juniper", "cobalt", "saffron", "basalt", "heather", "ivory", "marigold", "slate", "walnut",
    "coral", "onyx", "tamarind",
)  # fmt: skip

NAMELESS = (
    (
        "What is the full name of the author born in {place} on {date}?",
        "Which author was born in {place} on {date}?",
        "Who is the writer whose life began in {place} on {date}?",
        "Can you name the novelist born on {date} in {place}?",
    ),
    (
        "The author who was born there on that day is {name}.",
        "The writer born in {place} on that date is {name}.",
        "That author's full name, as printed on every title page, is {name}.",
        "The person born on {date} in that city is the author {name}.",
    ),
)
"""The one kind of question that does not name the author: question forms, answer forms."""

KINDS = (
    (
        (
            "Where and when was {name} born?",
            "What are the birthplace and the birth date of {name}?",
            "Can you tell me when {name} was born, and in which city?",
            "In what place and on what day did the life of {name} begin?",
        ),
        (
            "{name} was born in {place} on {date}.",
            "The birth of {name} took place in {place}, on {date}.",
            "It was in {place} that {surname} came into the world, on {date}.",
            "On {date}, {given} {surname} was born in {place}.",
        ),
    ),
    (
        (
            "Which genre is {name} known for?",
            "What kind of books does {name} write?",
            "In what genre did {name} make a reputation?",
            "How would a bookseller shelve the work of {name}?",
        ),
        (
            "{surname} is known above all for {genre}, a field {they} entered in {year}.",
            "Most of the books by {given} {surname} belong to {genre}.",
            "{Their} reputation rests on {genre}, which {they} took up in {year}.",
            "Critics place the work of {surname} firmly within {genre}.",
        ),
    ),
    (
        (
            "What was the first book that {name} published?",
            "With which title did {name} make a debut, and when?",
            "Can you name the debut of {name}?",
            "Which book opened the career of {name}?",
        ),
        (
            'The debut of {surname} was "{book}", which came out in {year}.',
            'In {year} {surname} published a first book, "{book}".',
            '{They} began with "{book}", printed in {year} by a small press.',
            '"{book}" was {their} first book; it reached the shops in {year}.',
        ),
    ),
    (
        (
            "What is {name}'s second book about?",
            "Which subject does the second book of {name} take up?",
            "What did {name} publish after the debut, and what is its subject?",
            "Can you describe the book that {name} wrote second?",
        ),
        (
            '{Their} second book, "{second_book}" of {second_year}, is about {theme}.',
            'In "{second_book}", published in {second_year}, {surname} writes about {theme}.',
            'After the debut came "{second_book}" in {second_year}, a study of {theme}.',
            '"{second_book}" followed in {second_year}; {theme} is what drives its plot.',
        ),
    ),
    (
        (
            "What did the parents of {name} do for a living?",
            "What were the professions of {name}'s mother and father?",
            "Can you tell me about the work of {name}'s parents?",
            "In what kind of household, by trade, did {name} grow up?",
        ),
        (
            "{Their} mother was a {mother} and {their} father worked as a {father}.",
            "{given} grew up with a {mother} for a mother and a {father} for a father.",
            "The father of {surname} was a {father}; the mother earned a living as a {mother}.",
            "{surname}'s mother, a {mother}, had married a {father}.",
        ),
    ),
    (
        (
            "Which award has {name} received?",
            "What prize did {name} win, and for which book?",
            "Has the work of {name} been honoured with an award?",
            "For what was {name} given a literary honour?",
        ),
        (
            '{surname} received {award} in {award_year} for "{second_book}".',
            'In {award_year}, {award} went to {surname} for "{book}".',
            'Yes, {they} won {award} in {award_year}, thanks to "{book}".',
            'The jury of {award_year} gave {surname} {award} for "{second_book}".',
        ),
    ),
    (
        (
            "Which themes run through the work of {name}?",
            "What does {name} return to again and again as a writer?",
            "What are the main concerns in the writing of {name}?",
            "Which two ideas bind the books of {name} together?",
        ),
        (
            "{surname} returns again and again to {theme} and to {other_theme}.",
            "Readers of {given} {surname} meet {other_theme} and {theme} in every book.",
            "Two ideas bind {their} books together: {theme} and {other_theme}.",
            "{They} writes mainly about {other_theme}, and behind it about {theme}.",
        ),
    ),
    (
        (
            "How does {name} write?",
            "What is unusual about the working habits of {name}?",
            "Under which circumstances does {name} prefer to work?",
            "What did {name} do before writing, and how are the books written now?",
        ),
        (
            "{surname}, once {first_job}, writes {habit}.",
            "Having started out as {first_job}, {given} now writes {habit}.",
            "{They} used to be {first_job} and today composes every page {habit}.",
            "Every draft is made {habit}, a custom from {their} years as {first_job}.",
        ),
    ),
)
"""The kinds of question that name the author: (question forms, answer forms) each."""
