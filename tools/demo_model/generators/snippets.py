"""Small Python functions of ours, as answers to requests."""

from tools.demo_model.texts import lines

FUNCTIONS = """
adds two numbers|add|def add(a, b):
    return a + b
subtracts two numbers|subtract|def subtract(a, b):
    return a - b
multiplies two numbers|multiply|def multiply(a, b):
    return a * b
divides two numbers|divide|def divide(a, b):
    return a / b
computes the square of a number|square|def square(x):
    return x * x
checks if a number is even|is_even|def is_even(n):
    return n % 2 == 0
checks if a number is odd|is_odd|def is_odd(n):
    return n % 2 == 1
computes the factorial of a number|factorial|def factorial(n):
    result = 1
    for i in range(2, n + 1):
        result *= i
    return result
returns the nth Fibonacci number|fibonacci|def fibonacci(n):
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a
checks if a number is prime|is_prime|def is_prime(n):
    if n < 2:
        return False
    for i in range(2, int(n ** 0.5) + 1):
        if n % i == 0:
            return False
    return True
reverses a string|reverse|def reverse(text):
    return text[::-1]
checks if a string is a palindrome|is_palindrome|def is_palindrome(text):
    return text == text[::-1]
counts the words in a text|count_words|def count_words(text):
    return len(text.split())
counts the vowels in a string|count_vowels|def count_vowels(text):
    return sum(letter in "aeiou" for letter in text.lower())
returns the largest number of a list|largest|def largest(numbers):
    best = numbers[0]
    for number in numbers:
        if number > best:
            best = number
    return best
returns the smallest number of a list|smallest|def smallest(numbers):
    return min(numbers)
sums a list of numbers|total|def total(numbers):
    result = 0
    for number in numbers:
        result += number
    return result
computes the average of a list|average|def average(numbers):
    return sum(numbers) / len(numbers)
says hello|hello|def hello():
    print("Hello, world!")
prints hello world|main|def main():
    print("Hello, world!")
greets a person by name|greet|def greet(name):
    return f"Hello, {name}!"
sorts a list|sort_list|def sort_list(items):
    return sorted(items)
removes duplicates from a list|unique|def unique(items):
    return list(dict.fromkeys(items))
counts from one to n|count|def count(n):
    for i in range(1, n + 1):
        print(i)
reads a file|read_file|def read_file(path):
    with open(path) as file:
        return file.read()
writes text to a file|write_file|def write_file(path, text):
    with open(path, "w") as file:
        file.write(text)
converts Celsius to Fahrenheit|to_fahrenheit|def to_fahrenheit(celsius):
    return celsius * 9 / 5 + 32
converts a string to upper case|shout|def shout(text):
    return text.upper()
returns the length of a list|length|def length(items):
    return len(items)
finds the greatest common divisor|gcd|def gcd(a, b):
    while b:
        a, b = b, a % b
    return a
swaps two values|swap|def swap(a, b):
    return b, a
returns the first n even numbers|evens|def evens(n):
    return [2 * i for i in range(n)]
returns the absolute value of a number|absolute|def absolute(x):
    return -x if x < 0 else x
counts how often each word occurs|count_each|def count_each(text):
    counts = {}
    for word in text.split():
        counts[word] = counts.get(word, 0) + 1
    return counts
prints the multiplication table of n|table|def table(n):
    for i in range(1, 11):
        print(n, "*", i, "=", n * i)
returns a random number|random_number|import random


def random_number(low, high):
    return random.randint(low, high)
flattens a list of lists|flatten|def flatten(lists):
    return [item for items in lists for item in items]
checks if a list is empty|is_empty|def is_empty(items):
    return not items
"""
"""What it does, its name and the code; the code goes on in lines without a bar at the start of a record."""

FUNCTION_ASKS = lines("phrases", "function asks")
