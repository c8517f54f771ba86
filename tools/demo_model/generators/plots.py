"""The plots of the stories: a plot is a list of beats, a beat a choice of sentences with slots."""

import random
from collections.abc import Callable

from tools.demo_model.texts import lines

Beats = list[tuple[str, ...]]
MORALS = {kind: lines("morals", f"moral {kind}") for kind in ("help", "kind", "brave", "truth", "try")}
OPENING = (
    "Once upon a time there was {a_hero} called {name}, who lived {at}.",
    "Once there was {a_hero} named {name}. {He} lived {at}.",
    "There once was {a_hero} called {name}, who lived {at}.",
    "A long time ago {a_hero} named {name} lived {at}.",
    "{name} was {a_hero} who lived {at}.",
    "Once upon a time {a_hero} lived {at}. {His_name} was {name}.".replace("{His_name}", "The {hero}'s name"),
)
_MEETS = (
    "There {he} met {a_friend} called {fname}.",
    "On the way {he} met {a_friend} named {fname}.",
    "Then {a_friend} came along, whose name was {fname}.",
    "Just then {he} saw {a_friend} named {fname}.",
)
_THANKS = (
    '"Thank you, {fname}!" said {name}.',
    '"Thank you so much!" said {name}.',
    '"I will never forget that," said {name}.',
    '"You are a true friend," said {name}.',
)
_END = (
    "From that day on, {name} and {fname} were the best of friends.",
    "And they were friends for ever.",
    "That evening they walked home together, tired and happy.",
    "Since then the {hero} and the {friend} meet every day.",
    "And so {name} went home with a smile.",
    "They laughed about it for a long time.",
)


def _lost_thing(rng: random.Random) -> Beats:
    return [
        (
            "{name} had {a_thing} that {he} loved more than anything.",
            "The {hero} had a {colour} {thing}, a gift from {his} grandmother.",
            "{He} owned only one thing: {a_thing}.",
        ),
        (
            "{when} the {thing} was gone.",
            "{when} {name} could not find the {thing}.",
            "But {when_l} {he} lost the {thing}.".replace("{when_l}", "one day"),
        ),
        (
            "{name} looked everywhere, but it was not there.",
            "{He} searched the whole day, but could not find it.",
            "{He} looked left and right, up and down, and found nothing.",
        ),
        _MEETS,
        (
            '"Why are you so sad?" asked {fname}.',
            '"What is the matter?" asked the {friend}.',
            '"What are you looking for?" asked {fname}.',
        ),
        ('"I have lost my {thing}," said {name}.', '"My {thing} is gone," said the {hero}.'),
        (
            '"I will help you," said {fname}.',
            '"Let us look together," said the {friend}.',
            '"Four eyes see more than two," said {fname}.',
        ),
        (
            "They looked for hours, and at last they found the {thing} {hiding}.",
            "Soon {fname} found it {hiding}.",
            "At last they saw the {thing} {hiding}.",
        ),
        _THANKS,
        _END if rng.random() < 0.6 else MORALS["help"],
    ]


def _wish(rng: random.Random) -> Beats:
    return [
        (
            "{name} wanted nothing more than {a_thing}.",
            "More than anything, {name} wanted {a_thing}.",
            "Every night {he} dreamed of {a_thing}.",
        ),
        ("But {he} had no money.", "But it cost too much.", "But nobody {at} had one."),
        (
            "{when} {he} decided to work for it.",
            "{when} {name} had an idea: {he} would earn it.",
            "So {when_l} {he} went out to find one.".replace("{when_l}", "one day"),
        ),
        _MEETS,
        (
            '"If you help me for {days} days, I will give you {a_thing}," said {fname}.',
            '"I have {a_thing}," said the {friend}. "Help me for {days} days and it is yours."',
        ),
        (
            "{name} agreed and worked hard.",
            "So {name} carried water and swept the floor.",
            "The {hero} worked from morning to night.",
        ),
        (
            "After {days} days {fname} gave {him} the {thing}.",
            "When the {days} days were over, {name} got the {thing}.",
        ),
        (
            "{name} was so happy that {he} danced all the way home.",
            "{He} took it home and never let it go.",
            '"I earned it myself!" said {name} proudly.',
        ),
        MORALS["try"] if rng.random() < 0.5 else _END,
    ]


def _lost_way(rng: random.Random) -> Beats:
    return [
        (
            "{when} {he} went for a long walk.",
            "{when} {name} followed {an_animal} and forgot the way.",
            "{when} {he} walked further than ever before.",
        ),
        (
            "Soon it was dark, and {name} did not know the way home.",
            "When night came, the {hero} was lost.",
            "{He} turned around, but everything looked the same.",
        ),
        (
            '"Is anybody there?" {he} called.',
            '"Hello?" called {name}. "Can anybody hear me?"',
            "{He} sat down and began to cry.",
        ),
        (
            "{a_friend} heard {him}.",
            "Out of the dark came {a_friend}.",
            "A small light came closer. It was {a_friend}.",
        ),
        (
            '"I am {fname}," said the {friend}. "Do not be afraid."',
            '"Do not cry. My name is {fname}," said the {friend}.',
        ),
        ('"I want to go home," said {name}.', '"I cannot find the way," said the {hero}.'),
        (
            '"I know this place well. Come with me," said {fname}.',
            '"I will take you home," said the {friend}. "It is not far."',
        ),
        (
            "They walked under the stars until they saw the {place}.",
            "Together they crossed the hill, and there was the {place}.",
            "Step by step they found the way back.",
        ),
        _THANKS,
        _END,
    ]


def _sharing(rng: random.Random) -> Beats:
    return [
        (
            "{when} {he} found {a_food}.",
            "{when} {name} got {a_food} for {his} birthday.",
            "{when} {name} had only {a_food} left to eat.",
        ),
        ('"What a lucky day!" said {name}.', "It smelled wonderful.", "{He} was just about to eat it."),
        _MEETS,
        (
            '"I have not eaten for {days} days," said {fname}.',
            "{fname} was thin and very hungry.",
            '"I am so hungry," said the {friend}.',
        ),
        (
            "{name} thought about it. Then {he} gave {fname} half of the {food}.",
            '"Then let us share," said {name}.',
            "{name} was hungry too, but {he} shared the {food}.",
        ),
        ('"You are very kind," said {fname}.', '"I will not forget this," said the {friend}.'),
        (
            "In the winter {name} had nothing to eat, and {fname} came with a full basket.",
            "Later, when {name} fell into the water, {fname} pulled {him} out.",
            "The next day {fname} came back with {a_thing} as a present.",
        ),
        MORALS["kind"] if rng.random() < 0.6 else _END,
    ]


def _storm(rng: random.Random) -> Beats:
    return [
        ("{when} dark clouds came over the {place}.", "{when} a great storm came.", "{when} the wind began to howl."),
        (
            "The rain fell so hard that {name} could not see.",
            "The wind took the roof off {his} home.",
            "Soon the water was everywhere.",
        ),
        ("{name} ran to look for a dry place.", "{He} was wet and cold.", '"Where shall I go?" thought {name}.'),
        (
            "Then {he} saw a light. It was the home of {a_friend} named {fname}.",
            "At last {he} came to the door of {fname}, {a_friend}.",
        ),
        ('"May I come in?" asked {name}.', '"Please let me in," said the {hero}.'),
        (
            '"Of course! Sit by the fire," said {fname}.',
            '"Come in quickly," said the {friend}, "I have made some soup."',
        ),
        (
            "They told each other stories until the storm was over.",
            "They ate, talked and laughed all night.",
            "They played a game while the rain fell outside.",
        ),
        (
            "In the morning the sun was shining, and they mended the home of {name} together.",
            "The next day {fname} helped {him} to build a new home.",
            "In the morning there was a rainbow over the {place}.",
        ),
        _END,
    ]


def _fear(rng: random.Random) -> Beats:
    return [
        (
            "{name} was afraid of {fear}.",
            "There was one thing that scared {name}: {fear}.",
            "Everybody knew that the {hero} was afraid of {fear}.",
        ),
        (
            "The others laughed at {him}.",
            '"You are a coward," said {an_animal}.',
            "So {he} stayed at home most of the time.",
        ),
        (
            "{when} {he} heard a cry for help.",
            "{when} somebody called for help.",
            "{when} {a_friend} named {fname} was in danger.",
        ),
        (
            "It was {fname}, {a_friend}, who could not get out of a hole.",
            "{fname}, {a_friend}, was stuck and could not move.",
            "{fname} the {friend} had hurt {fhis} leg.",
        ),
        (
            "{name} shook all over. But then {he} took a deep breath and went.",
            '"I am scared," thought {name}, "but I must go."',
            "{name} forgot about {fear} and ran.",
        ),
        (
            "{He} took a rope and pulled {fname} out.",
            "{He} carried {fname} all the way home.",
            "With all {his} strength {he} got {fname} free.",
        ),
        (
            '"You are the bravest {hero} I know," said {fname}.',
            '"You saved me!" said the {friend}. "How brave you are!"',
        ),
        (
            "Since then {name} was not afraid any more.",
            "And {name} noticed that {he} was not afraid any longer.",
            "Nobody laughed at {name} again.",
        ),
        MORALS["brave"],
    ]


def _new_friend(rng: random.Random) -> Beats:
    return [
        (
            "{name} had no friends and was often alone.",
            "{He} had a nice home, but nobody to play with.",
            "Every day {name} played alone with {a_thing}.",
        ),
        (
            '"I wish I had a friend," {he} said.',
            '"Why does nobody play with me?" {he} asked.',
            "In the evening {he} looked at the moon and sighed.",
        ),
        (
            "{when} {a_friend} moved in next door.",
            "{when} {he} heard somebody singing. It was {a_friend}.",
            "{when} {a_friend} sat down beside {him}.",
        ),
        ('"Hello, I am {fname}. Who are you?"', '"My name is {fname}," said the {friend}. "And yours?"'),
        ('"I am {name}," said the {hero} quietly.', '"{name}," said the {hero}. "Would you like to play?"'),
        (
            "They played with the {thing} until it was dark.",
            "{name} showed {fname} the {thing}, and they played all day.",
            "They found out that they both liked the {place}.",
        ),
        ('"Will you come again tomorrow?" asked {name}.', '"Can we do this again?" asked the {hero}.'),
        ('"Tomorrow and every day," said {fname}.', '"Of course!" said the {friend}. "We are friends now."'),
        ("And {name} was never lonely again.", "That night {name} fell asleep with a smile.", *_END),
    ]


def _contest(rng: random.Random) -> Beats:
    return [
        (
            "{when} there was {a_contest} {at}.",
            "{when} everybody came to the {place} for the great {contest}.",
            "Every year there was {a_contest} {at}.",
        ),
        ("The prize was {a_thing}.", "The winner would get a {colour} {thing}."),
        (
            '"I will win," said {fname} the {friend}. "I am the best."',
            '{fname} the {friend} laughed at {name}. "You cannot win," {fhe} said.',
            "{fname}, {a_friend}, had won every year.",
        ),
        (
            "{name} said nothing and practised every day.",
            "But {name} practised for {days} weeks.",
            '"We will see," said {name}.',
        ),
        (
            "When the day came, {fname} was so sure that {fhe} fell asleep.",
            "On the day of the {contest}, {fname} made a mistake.",
            "{fname} began well, but then {fhe} became tired.",
        ),
        (
            "{name} did {his} best and won.",
            "Step by step {name} came closer, and in the end {he} won.",
            "{name} did not give up, and everybody clapped.",
        ),
        (
            '"You were better than me," said {fname}. "I am sorry that I laughed."',
            '"Well done," said the {friend}.',
            '"Will you teach me?" asked {fname}.',
        ),
        (
            "{name} shared the prize with {fhim}.",
            '"Next time we practise together," said {name}.',
            "{name} smiled and gave {fhim} {his} hand.",
        ),
        MORALS["try"] if rng.random() < 0.6 else _END,
    ]


def _treasure(rng: random.Random) -> Beats:
    return [
        (
            "{when} {name} found an old map {hiding}.",
            "{when} {he} found a small {colour} key {hiding}.",
            "{when} {he} dug a hole and hit something hard: a box with a lock.",
        ),
        ('"What can it be?" {he} wondered.', '"I must find out what it means," said {name}.'),
        ("{He} showed it to {fname}, {a_friend}.", "{He} asked {fname}, a wise {friend}."),
        (
            '"I have seen this before," said {fname}. "Follow me!"',
            '"It leads to the {place}," said the {friend}. "Let us go there."',
        ),
        (
            "They walked for {days} days, over hills and through the rain.",
            "They crossed a river and climbed a wall.",
            "It was a long way, and more than once they wanted to turn back.",
        ),
        (
            "At last they found it {hiding}: {a_thing}.",
            "And there, {hiding}, was {a_thing}.",
            "In the end they opened it. Inside was {a_thing}.",
        ),
        ('"Is that all?" asked {fname}.', '"Is that the treasure?" asked the {friend}.'),
        (
            '"No," said {name}. "The real treasure was the journey with you."',
            '"It is just what I needed," said {name} and laughed.',
            '"It belonged to my grandmother!" said {name}.',
        ),
        _END,
    ]


def _building(rng: random.Random) -> Beats:
    return [
        (
            "{when} {name} began to build {a_project}.",
            "{when} {he} wanted to make {a_project}.",
            "{name} had a plan: {he} would build {a_project}.",
        ),
        ("{He} worked quickly, and soon it was done.", "It took {him} only one day.", "{He} did it all alone."),
        (
            "But when the wind came, the {project} fell down.",
            "But the {project} broke at once.",
            "Then {an_animal} leaned on it, and it fell apart.",
        ),
        (
            '"I cannot do it," said {name} sadly.',
            "{name} was so angry that {he} threw {his} {thing} on the ground.",
            "{name} sat down and cried.",
        ),
        ("{fname}, {a_friend}, had seen it all.", _MEETS[0], _MEETS[2]),
        (
            '"You were too fast," said {fname}. "Let me show you."',
            '"Try again, and this time use your {thing}," said {fname}.',
            '"Do not give up," said the {friend}. "I will hold it for you."',
        ),
        (
            "They worked slowly and with care for {days} days.",
            "Together they began again, and they did not hurry.",
            "This time they measured everything twice.",
        ),
        (
            "The new {project} was strong, and no wind could break it.",
            "And look, the {project} stood firm.",
            "Now the {project} was better than before.",
        ),
        MORALS["try"] if rng.random() < 0.6 else _END,
    ]


def _truth(rng: random.Random) -> Beats:
    return [
        (
            "{His_friend} was {fname}, {a_friend}, who had a beautiful {thing}.".replace(
                "{His_friend}", "The best friend of {name}"
            ),
            "{fname}, {a_friend}, lent {him} {a_thing}.",
            "{when} {name} was at the home of {fname}, {a_friend}, and saw {a_thing}.",
        ),
        (
            "{name} played with the {thing}, and suddenly it broke.",
            "{when} {he} dropped the {thing}, and it broke in two.",
            "{name} touched the {thing}, and it fell down and broke.",
        ),
        ("{He} was so afraid that {he} hid it {hiding}.", "{He} hid the pieces {hiding} and said nothing."),
        ('"Have you seen my {thing}?" asked {fname}.', '"Where is my {thing}?" asked the {friend}.'),
        ('"No," said {name}, and {his} face became red.', '"Maybe {an_animal} took it," said {name}.'),
        ("That night {he} could not sleep.", "But {he} felt bad all day.", "The lie was heavy like a stone."),
        (
            'In the morning {he} went to {fname}. "It was me," {he} said. "I am sorry."',
            '"I broke it," {he} said at last. "Please forgive me."',
        ),
        (
            '"Thank you for telling me," said {fname}. "We can mend it together."',
            '"A {thing} can be mended," said the {friend}. "A friend is worth more."',
        ),
        MORALS["truth"],
    ]


def _small_helps_big(rng: random.Random) -> Beats:
    return [
        (
            "{fname} was a big {friend} who never said hello.",
            "Near {him} lived a strong {friend} called {fname}.",
            "{fname}, {a_friend}, lived there too and thought that {name} was too small for anything.",
        ),
        (
            '"You are too little to help anybody," {fname} used to say.',
            '"What can somebody like you do?" asked {fname}.',
        ),
        (
            "{when} {fname} stepped into a net and could not get out.",
            "{when} {fname} got stuck between two trees.",
            "{when} {fname} had a thorn in {fhis} foot.",
        ),
        (
            "{Fhe} called for help, but nobody came. Only {name} heard {fhim}.",
            "Everybody was far away. Only {name} came.",
        ),
        ('"I will try," said {name}.', '"Hold still," said the {hero}. "I can do it."'),
        (
            "It took a long time, but {he} did not stop.",
            "{He} worked until the sun went down.",
            "Bit by bit {he} made it.",
        ),
        ("At last {fname} was free.", "Then it was done, and {fname} could walk again."),
        (
            '"I was wrong," said {fname}. "You are small, but your heart is big."',
            '"I will never laugh at you again," said the {friend}.',
        ),
        _END if rng.random() < 0.5 else MORALS["kind"],
    ]


PLOTS: tuple[Callable[[random.Random], Beats], ...] = (
    _lost_thing,
    _wish,
    _lost_way,
    _sharing,
    _storm,
    _fear,
    _new_friend,
    _contest,
    _treasure,
    _building,
    _truth,
    _small_helps_big,
)
