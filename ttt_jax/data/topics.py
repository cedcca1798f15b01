"""What the two speakers talk about: exchanges whose {slots} are filled from the lexicon.

An exchange is (speaker, line) pairs. A slot written twice in one exchange holds the same word both times.
"""

MAIN, OTHER = "main", "other"


def _exchanges(text: str) -> tuple[tuple[tuple[str, str], ...], ...]:
    """Blocks of lines divided by empty ones; a line starts with M: for the main speaker or O: for the other."""
    speakers = {"M": MAIN, "O": OTHER}
    blocks = [block.strip().splitlines() for block in text.strip().split("\n\n")]
    return tuple(tuple((speakers[line.strip()[0]], line.strip()[2:].strip()) for line in block) for block in blocks)


OPENING = _exchanges("""
    M: hello, it is good to hear your voice again. how are you today?
    O: hello, I am fine, thank you. I have a lot of time to talk.
    M: that is wonderful, because there is so much that I want to tell you.
""")[0]

CLOSING = _exchanges("""
    O: it is getting late, and I have to go now.
    M: thank you very much for talking with me. I wish you a good evening, and see you soon.
    O: goodbye, take care.
""")[0]

TOPICS = {
    "family": _exchanges("""
        M: let us talk about the family. my {relative} called me on {day} and talked for an hour.
        O: really? and what did your {relative} say?

        M: well, the whole family is going to meet in {city} at the end of {month}.
        O: that sounds like a big party. how many people are coming?

        M: I think that there will be about {number} people, and everybody wants to bring {food}.
        O: then you will not be hungry.

        O: is your {relative} coming too?
        M: yes, of course. my {relative} works as a {job} now and is very happy with the new job.

        M: when we were children, we spent every summer with our {relative} in {country}.
        O: I remember that you told me about it.
    """),
    "cooking": _exchanges("""
        M: let us talk about cooking. yesterday I made {food} with a lot of {ingredient}.
        O: that sounds delicious. was it difficult?

        M: not at all. first you cut the {ingredient} into small pieces, and then you put it into a hot pan.
        O: and how long does it take?

        M: it takes about {number} minutes, and you should not forget the salt.
        O: I always forget the salt.

        O: what do you drink with it?
        M: I like to drink a glass of {drink} with it, and after that I eat some {fruit}.

        M: the next time that you come to my house, I will make {food} for you.
        O: thank you, I am looking forward to it.
    """),
    "travel": _exchanges("""
        M: let us talk about travel. in {month} I want to take the {transport} to {city}.
        O: have you been there before?

        M: yes, I was there {number} years ago, and I stayed in a {quality} hotel near the {place}.
        O: I have never been there.

        O: what do you want to see in {city}?
        M: first of all I want to see the {place}, because everybody says that it is very {quality}.

        M: after that I want to travel to {country} and stay there for {number} days.
        O: do not forget to send me a letter.

        O: what do you take with you?
        M: I always take a {object} and a warm {clothes} with me, because you never know what will happen.
    """),
    "work": _exchanges("""
        M: let us talk about work. on {day} I had a long meeting with a {job} from {city}.
        O: and what was it about?

        M: we talked about the new {place}, and it took more than {number} hours.
        O: meetings are always too long.

        O: do you like the people in your office?
        M: yes, most of them are very nice, but the {job} next to me is always {feeling}.

        M: at the end of the day I was so {feeling} that I went straight home and drank some {drink}.
        O: I know that feeling very well.

        O: would you like to do something else?
        M: sometimes I think that I would like to be a {job} and live in {country}.
    """),
    "weather": _exchanges("""
        M: let us talk about the weather. this morning there was a lot of {weather} here.
        O: here it was the same. I had to wear my {clothes}.

        M: the radio says that there will be {weather} on {day} and maybe some {weather2} after that.
        O: I do not believe the radio.

        O: what is your favorite month?
        M: I like {month} the most, because then you can go to the {place} every day.

        M: do you remember the terrible {weather} in {month}, when the {transport} did not come?
        O: of course I remember. we waited for hours.
    """),
    "music": _exchanges("""
        M: let us talk about music. I am learning to play the {instrument}, and I practice every {day}.
        O: is it hard to play the {instrument}?

        M: in the beginning it was very hard, but now I can play {number} songs.
        O: you have to play them for me.

        O: what kind of music do you listen to?
        M: most of the time I listen to {music}, and when I am {feeling} I listen to {music2}.

        M: last {day} I went to a concert in {city}, and the {instrument} player was wonderful.
        O: I wish I had been there.
    """),
    "animals": _exchanges("""
        M: let us talk about animals. my {relative} has a new {animal} that sleeps under the {furniture}.
        O: a {animal}? that is unusual.

        M: it is a very {quality} animal, and it eats {number} times a day.
        O: and what does it eat?

        M: it likes {fruit} and {food}, but it does not like {ingredient} at all.
        O: that is funny.

        O: did you see any animals at the {place}?
        M: yes, I saw a {color} {animal} and a {animal2}, and they were not afraid of people.
    """),
    "house": _exchanges("""
        M: let us talk about the house. I want to paint the {room} in {color} next week.
        O: {color} is a nice color for a {room}.

        M: for that I need a {tool} and a {tool2}, but I cannot find them anywhere.
        O: you can have mine.

        O: what happened to your old {furniture}?
        M: I gave the old {furniture} to my {relative}, and now there is a {object} in the {room}.

        M: the {room} is a bit {quality}, but in the evening it is the best place in the whole house.
        O: I would like to see it.
    """),
    "sport": _exchanges("""
        M: let us talk about sport. on {day} we played {sport} against the team from {city}.
        O: and who won the game?

        M: we won by {number} points, and after the game we were all very {feeling}.
        O: congratulations. you have a good team.

        O: do you still like {hobby}?
        M: yes, I love {hobby}, but I do not have enough time for it.

        M: my {relative} thinks that {sport} is boring, but I could watch it for hours.
        O: I like {sport2} more.
    """),
    "books": _exchanges("""
        M: let us talk about books. at the moment I am reading a {story} story by a {job} from {country}.
        O: is it a good book?

        M: it is about a {job2} who finds a {color} {object} in the {place}, and then everything goes wrong.
        O: do not tell me the end.

        O: where do you get all your books?
        M: I get them from the library near the {place}, and I can keep them for {number} weeks.

        M: at school I never liked {subject}, but now I read about {subject} every day.
        O: people change.
    """),
    "shopping": _exchanges("""
        M: let us talk about shopping. yesterday I went to the market and bought {fruit} and {food}.
        O: was it expensive?

        M: it was only {number} dollars, and the seller gave me some {ingredient} as a present.
        O: that was very kind.

        O: did you buy any clothes?
        M: yes, I bought a {color} {clothes}, because my old one was too small.

        M: on {day} I have to go back to the shop, because I left my {object} there.
        O: I hope that they still have it.
    """),
    "garden": _exchanges("""
        M: let us talk about the garden. in {month} I want to plant some {flower} next to the {tree} tree.
        O: how nice. I love {flower}.

        M: last year the {weather} destroyed all of my {fruit}, and I was very {feeling}.
        O: maybe this year will be better.

        O: do you have trees in your garden?
        M: yes, there is an old {tree} tree, and in the summer I sit under it and drink {drink}.

        M: in the evening a {animal} comes into the garden and looks for something to eat.
        O: I would like to see that.
    """),
}

# Facts: kind -> lexicon list, number of words, and lines. {value} is the fact; `own` lines are about the main speaker,
# `their` lines about the other.
FACTS = {
    "sister_city": {
        "list": "city",
        "own": (
            "by the way, my sister lives in {value}.",
            "where does your sister live?",
            "my sister lives in {value}.",
        ),
        "their": (
            "by the way, my sister lives in {value}.",
            "where does my sister live?",
            "your sister lives in {value}.",
        ),
    },
    "best_friend": {
        "list": "name",
        "own": (
            "by the way, my best friend is called {value}.",
            "what is the name of your best friend?",
            "my best friend is called {value}.",
        ),
        "their": (
            "by the way, my best friend is called {value}.",
            "what is the name of my best friend?",
            "your best friend is called {value}.",
        ),
    },
    "door_code": {
        "list": "digit",
        "words": 4,
        "own": (
            "by the way, the code for my door is {value}.",
            "what is the code for your door?",
            "the code for my door is {value}.",
        ),
        "their": (
            "by the way, the code for my door is {value}.",
            "what is the code for my door?",
            "the code for your door is {value}.",
        ),
    },
    "pet_name": {
        "list": "pet",
        "own": (
            "by the way, the name of my dog is {value}.",
            "what is the name of your dog?",
            "the name of my dog is {value}.",
        ),
        "their": (
            "by the way, the name of my dog is {value}.",
            "what is the name of my dog?",
            "the name of your dog is {value}.",
        ),
    },
    "birth_month": {
        "list": "month",
        "own": ("by the way, my birthday is in {value}.", "when is your birthday?", "my birthday is in {value}."),
        "their": ("by the way, my birthday is in {value}.", "when is my birthday?", "your birthday is in {value}."),
    },
    "favorite_food": {
        "list": "food",
        "own": (
            "by the way, my favorite food is {value}.",
            "what is your favorite food?",
            "my favorite food is {value}.",
        ),
        "their": (
            "by the way, my favorite food is {value}.",
            "what is my favorite food?",
            "your favorite food is {value}.",
        ),
    },
    "car_color": {
        "list": "color",
        "own": (
            "by the way, the color of my car is {value}.",
            "what is the color of your car?",
            "the color of my car is {value}.",
        ),
        "their": (
            "by the way, the color of my car is {value}.",
            "what is the color of my car?",
            "the color of your car is {value}.",
        ),
    },
    "street": {
        "list": "street",
        "own": ("by the way, I live in {value} street.", "in which street do you live?", "I live in {value} street."),
        "their": ("by the way, I live in {value} street.", "in which street do I live?", "you live in {value} street."),
    },
    "own_name": {
        "list": "name",
        "own": ("by the way, my name is {value}.", "what is your name?", "my name is {value}."),
        "their": ("by the way, my name is {value}.", "what is my name?", "your name is {value}."),
    },
    "father_job": {
        "list": "job",
        "own": ("by the way, my father was a {value}.", "what was the job of your father?", "my father was a {value}."),
        "their": (
            "by the way, my father was a {value}.",
            "what was the job of my father?",
            "your father was a {value}.",
        ),
    },
    "instrument": {
        "list": "instrument",
        "own": (
            "by the way, my first instrument was the {value}.",
            "what was your first instrument?",
            "my first instrument was the {value}.",
        ),
        "their": (
            "by the way, my first instrument was the {value}.",
            "what was my first instrument?",
            "your first instrument was the {value}.",
        ),
    },
    "holiday_country": {
        "list": "country",
        "own": (
            "by the way, my next holiday will be in {value}.",
            "where will your next holiday be?",
            "my next holiday will be in {value}.",
        ),
        "their": (
            "by the way, my next holiday will be in {value}.",
            "where will my next holiday be?",
            "your next holiday will be in {value}.",
        ),
    },
}

ACKNOWLEDGE_THEIR = "thank you, I will remember that."
ACKNOWLEDGE_OWN = "good to know."
FILLERS = ("well,", "you know,", "yeah,", "oh,", "hmm,", "I mean,", "actually,")
