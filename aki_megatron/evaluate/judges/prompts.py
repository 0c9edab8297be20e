"""What a judge is asked. The wording is this project's own.

Scores by these prompts are not comparable to those by the kits' prompts, digit by digit; PROMPTS_NAME is printed beside
them. Each prompt asks for the reply that the kits' parsers read.
"""

PROMPTS_NAME = "prompts aki-1"

LLAVABENCH_SYSTEM = "You compare the quality of two answers to a question, carefully and without favour."


def mmvet_prompt(question: str, answer: str, reply: str) -> str:
    """Ask for a grade from 0.0 to 1.0."""
    answer = answer.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return f"""Grade how correct an answer is, from 0.0 (entirely wrong) to 1.0 (entirely right), in steps of 0.1.
In the reference, parts joined by <AND> must all be in the answer for 1.0; of parts joined by <OR> one is enough.

Question: What are the roots? Reference: 2 <AND> 7. Answer: x = 3. Grade: 0.0
Question: What are the roots? Reference: 2 <AND> 7. Answer: x = 7. Grade: 0.5
Question: What are the roots? Reference: 2 <AND> 7. Answer: x is 2 or 7. Grade: 1.0
Question: Which animal is it? Reference: tabby <OR> cat. Answer: It is a cat. Grade: 1.0

Write the grade of the following answer as one number and nothing else.
Question: {question}
Reference: {answer}
Answer: {reply}
Grade:"""


def llavabench_prompt(caption: str, question: str, reference: str, reply: str) -> str:
    """Ask for two grades from 1 to 10 in the first line, the reference answer's first."""
    return f"""[Image, described in sentences]
{caption}

[Question about the image]
{question}

[Answer 1]
{reference}

[Answer 2]
{reply}

[Task]
Grade both answers from 1 to 10 for helpfulness, relevance, accuracy and detail; a better answer has a higher grade, \
whichever comes first. Write the two grades in the first line, answer 1 first, separated by one blank and with nothing \
else. Explain them in the lines after it."""


def mathvista_prompt(question: str, reply: str) -> str:
    """Ask for the final answer that a reply states."""
    return f"""Copy the final answer out of a response to a question, in the form that the question's hint asks for: a \
whole number, a number with decimals, a list in brackets, or the letter of an option. Write nothing else.

Question: Hint: answer with a whole number. How many lamps are there?
Response: I count 12 lamps along the street.
Final answer: 12

Question: Hint: answer with a number with one decimal. What is the slope?
Response: The line rises by 3 over 6 units, so the slope is 0.5.
Final answer: 0.5

Question: Hint: answer with a list. Between which years did it grow most?
Response: It grew most from 1998 to 1999.
Final answer: [1998, 1999]

Question: Hint: answer with the option's letter. Which is longer? Choices: (A) red (B) blue
Response: The blue one is longer.
Final answer: B

Question: {question}
Response: {reply}
Final answer:"""
