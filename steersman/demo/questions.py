"""How customers ask: wordings per asked field, split so that no wording of one set occurs in another."""

from random import Random

from steersman.demo.orderbook import Case

SETS = ("train", "validation", "heldout")

QUESTIONS: dict[str, dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]]] = {
    "order": {
        "status": (
            (
                "what is the status of my order?",
                "how far is order {order}?",
                "what is happening with my {item}?",
                "is my order moving at all?",
                "can you tell me the state of order {order}?",
                "any news on my {item}?",
                "where are you with my order?",
                "I need the status of {order}.",
                "has anything happened with my order yet?",
                "is there progress on the {item}?",
            ),
            ("how is my order coming along?", "could I get a status update?", "what stage is {order} at?"),
            (
                "what state are my {item} in?",
                "can I have an update on order {order}?",
                "did you do something with my order?",
                "how do things stand with {order}?",
                "what is going on with it?",
            ),
        ),
        "ships": (
            (
                "when will you ship my order?",
                "when do the {item} leave your warehouse?",
                "what day does {order} ship?",
                "when is it going out?",
                "on which day do you send my {item}?",
                "when will order {order} be sent?",
                "can you tell me the shipping day?",
                "when do you send it off?",
                "I want to know when my order ships.",
                "how long until you ship the {item}?",
            ),
            ("what is the dispatch day?", "when does my stuff leave?", "when do you dispatch {order}?"),
            (
                "when do you hand it to the carrier?",
                "which day do my {item} go out?",
                "by when is {order} on its way?",
                "when does the parcel leave you?",
                "what is the planned shipping date?",
            ),
        ),
    },
    "delivery": {
        "arrival": (
            (
                "when will my order arrive?",
                "when do I get my parcel?",
                "what day does {order} arrive?",
                "when can I expect the delivery?",
                "is there a delivery date for {order}?",
                "when is it delivered?",
                "on which day will it be here?",
                "tell me when my parcel comes.",
                "how long do I have to wait for it?",
                "I need the arrival day of {order}.",
            ),
            ("when does it get here?", "what is the delivery day?", "by when do I have my parcel?"),
            (
                "when should I be home for the parcel?",
                "which day will it reach me?",
                "what is the expected arrival of {order}?",
                "when does the driver bring it?",
                "do you know when it turns up?",
            ),
        ),
        "carrier": (
            (
                "who delivers my order?",
                "which carrier has my parcel?",
                "what company brings {order}?",
                "who is bringing the parcel?",
                "with whom did you ship {order}?",
                "which delivery service do you use?",
                "can you tell me the carrier?",
                "who did you send it with?",
                "I want to know who carries my parcel.",
                "which courier has {order}?",
            ),
            ("who transports my parcel?", "which firm delivers it?", "what is the carrier of {order}?"),
            (
                "whose van should I look for?",
                "what shipping company is it?",
                "who will be at my door with it?",
                "which service handles {order}?",
                "who took over the parcel?",
            ),
        ),
    },
    "invoice": {
        "total": (
            (
                "how much is my invoice?",
                "what is the total of invoice {invoice}?",
                "how much do I have to pay?",
                "what do I owe you?",
                "can you tell me the invoice amount?",
                "what sum is on invoice {invoice}?",
                "how many euros is it in total?",
                "I need the amount of {invoice}.",
                "what does the bill come to?",
                "how high is my bill?",
            ),
            ("what amount is open?", "what is the sum I owe?", "how much is {invoice}?"),
            (
                "how much money do you want from me?",
                "what figure is on invoice {invoice}?",
                "which amount should I transfer?",
                "what is the price on my bill?",
                "how big is the invoice?",
            ),
        ),
        "due": (
            (
                "when do I have to pay?",
                "when is invoice {invoice} due?",
                "by which day must I pay it?",
                "what is the due date?",
                "until when can I pay?",
                "how long do I have to pay {invoice}?",
                "when is the payment due?",
                "I want to know the due day.",
                "by when do you need the money?",
                "what is the last day to pay?",
            ),
            ("when is my bill due?", "what is the payment deadline?", "by when should I pay {invoice}?"),
            (
                "what is the deadline for invoice {invoice}?",
                "when must the transfer be there?",
                "how much time is left to pay?",
                "at what date do you expect my money?",
                "when at the latest do I settle it?",
            ),
        ),
    },
    "return": {
        "refund": (
            (
                "how much do I get back?",
                "what is my refund?",
                "how much is the refund for {return}?",
                "what amount will you refund?",
                "how many euros do you pay back?",
                "can you tell me the refund amount?",
                "what do I get for return {return}?",
                "I need to know how much you refund.",
                "how high is my refund?",
                "what sum comes back to me?",
            ),
            ("how big is the refund?", "what will you pay me back?", "which sum do you refund?"),
            (
                "how much money comes back for it?",
                "what refund amount can I expect?",
                "what is return {return} worth?",
                "which amount do I receive?",
                "how much will be credited to me?",
            ),
        ),
        "paid": (
            (
                "when do I get my refund?",
                "when do you pay the money back?",
                "what day is the refund paid?",
                "when will I see my money?",
                "on which day do you refund {return}?",
                "where is my refund?",
                "how long does my refund take?",
                "when is return {return} paid?",
                "I want to know when you refund me.",
                "when does the money arrive?",
            ),
            ("what is the refund day?", "when am I refunded?", "by when is {return} paid back?"),
            (
                "when will the refund be on my account?",
                "which day do I have my money back?",
                "how soon is the refund sent?",
                "when do you transfer what you owe me?",
                "when is the credit for {return} made?",
            ),
        ),
    },
    "stock": {
        "count": (
            (
                "how many {item} do you have?",
                "are the {item} in stock?",
                "what is the stock of {item}?",
                "how many can I order right now?",
                "do you have enough {item}?",
                "can you check the stock for me?",
                "how many pieces are there?",
                "I need the number in stock.",
                "what quantity do you have?",
                "how many {item} are left?",
            ),
            ("what number is in stock?", "how many are on the shelf?", "is the item available?"),
            (
                "how many {item} could I get today?",
                "what is left of the {item}?",
                "do you still have some, and how many?",
                "how much stock is there?",
                "which quantity is available?",
            ),
        ),
        "price": (
            (
                "what do the {item} cost?",
                "how much is one?",
                "what is the price of the {item}?",
                "can you tell me the price?",
                "how much do you charge for {item}?",
                "what does a single one cost?",
                "I need the price per piece.",
                "how many euros is one?",
                "what is the unit price?",
                "how expensive are the {item}?",
            ),
            ("what is the cost of one?", "how much are the {item}?", "at what price do you sell them?"),
            (
                "what would I pay for each?",
                "what is the price tag on the {item}?",
                "how much would one set me back?",
                "what do you want for a piece?",
                "which price do you have for {item}?",
            ),
        ),
        "refill": (
            (
                "when do you get more {item}?",
                "when is the next refill?",
                "when will new {item} come in?",
                "what day do you restock?",
                "when are more available?",
                "on which day is the stock refilled?",
                "can you tell me the restock day?",
                "when does the next batch come?",
                "I want to know when you refill.",
                "when do fresh {item} come?",
            ),
            ("when do you stock up again?", "what is the refill day?", "when is more coming?"),
            (
                "by when do you have more {item}?",
                "when does your supplier deliver again?",
                "what date is the next restock?",
                "when can I get a larger number?",
                "when will the shelf be full again?",
            ),
        ),
    },
    "escalation": {
        "manager": (
            (
                "who is handling my case?",
                "who is my contact for case {case}?",
                "which manager calls me?",
                "who takes care of my complaint?",
                "can I speak to a manager?",
                "what is the name of the manager?",
                "who is in charge of {case}?",
                "I want to know who is responsible.",
                "who will call me about this?",
                "give me the name of your boss.",
            ),
            ("who looks after my case?", "who is responsible for {case}?", "which person do I talk to?"),
            (
                "whom can I complain to?",
                "who deals with case {case} now?",
                "is there a manager on this, and who?",
                "what person will phone me?",
                "who do I ask for?",
            ),
        ),
        "call": (
            (
                "when does the manager call me?",
                "when will someone call about {case}?",
                "what day do you call me back?",
                "when do I hear from you?",
                "on which day is the call?",
                "how long until somebody calls?",
                "when is the call for case {case}?",
                "I want to know when you call.",
                "when does anyone get back to me?",
                "when will a manager talk to me?",
            ),
            ("when do I get my call?", "what is the day of the call?", "when do you ring me?"),
            (
                "when should I wait by the phone?",
                "which day will the manager ring?",
                "by when does somebody contact me?",
                "when do we speak about case {case}?",
                "what date is planned for the call?",
            ),
        ),
    },
}
"""Topic, asked field -> wordings of the train, validation and held-out sets."""

OPENERS = (
    ("", "", "", "Hi, ", "Hello, ", "Hey, ", "Good morning, ", "Sorry, ", "Well, ", "Please, ", "Quick one: ", "Ok, ",
     "This is annoying, ", "Again: ", "I am angry, ", "Not happy, "),
    ("", "", "Dear team, ", "Listen, ", "One question: "),
    ("", "", "Hi there, ", "Good evening, ", "Excuse me, ", "Now really, ", "I am upset, ", "Short question: "),
)  # fmt: skip
CLOSERS = (
    ("", "", "", "", "", " Thanks.", " Please.", " Hurry.", " Cheers.", " Asap!"),
    ("", "", "", " Thank you."),
    ("", "", "", " Many thanks.", " Quickly!", " I am waiting."),
)


def _typo(rng: Random, text: str) -> str:
    """Swap two inner letters of one longer lower-case word, as a hurried customer does."""
    words = text.split(" ")
    long_words = [index for index, word in enumerate(words) if len(word) > 4 and word.isalpha() and word.islower()]
    if not long_words:
        return text
    index = rng.choice(long_words)
    word = words[index]
    at = rng.randrange(1, len(word) - 2)
    words[index] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


def ask(rng: Random, case: Case, split: str) -> tuple[str, str]:
    """Return the customer's message and the wording (template) it was made from."""
    number = SETS.index(split)
    wording = rng.choice(QUESTIONS[case.topic][case.asked][number])
    text = rng.choice(OPENERS[number]) + wording.format(**case.record) + rng.choice(CLOSERS[number])
    if rng.random() < 0.12:
        text = _typo(rng, text)
    style = rng.random()
    if style < 0.55:
        text = text[0].upper() + text[1:]
    elif style < 0.75:
        text = text.lower().rstrip("?.")
    return text, wording
