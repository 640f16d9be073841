"""Word lists of the orders task. No name or city stands in two lists."""

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
COLOURS = "red blue green yellow black white grey brown purple pink orange silver gold beige".split()

# Every plural is the word and an s.
ITEMS = """
lamp chair table pillow blanket mirror clock vase candle curtain carpet basket bottle plate bowl spoon kettle
teapot mug jar towel bucket broom hammer drill ladder rope tent lantern backpack suitcase wallet umbrella hat cap
jacket sweater shirt skirt coat sock boot sandal belt ring necklace bracelet notebook pencil marker folder stapler
poster stamp ribbon balloon kite puzzle robot guitar drum flute violin camera printer keyboard monitor cable
speaker bicycle helmet scooter skateboard sofa cushion stool desk
""".split()

NAMES = """
Anna Peter Maria Tom Lucy Omar Sven Priya Chen Fatima Igor Elena Hassan Julia Marco Nina Oscar Paula Quentin Rosa
Samuel Teresa Ulrich Vera Walter Yusuf Zoe Adam Bella Carlos Diana Emil Freya Gustav Hanna Ivan Jasmine Karim Lena
Mateo Nora Otto Pablo Rita Stefan Tanja Umar Viktor Wanda Yara Zainab Aaron Beatrice Cedric Doris Edgar Farah George
Heidi Ismail Jonas Katarina Leon Mila Noah Olga Patrick Rachel Simon Tamara Ursula Vincent Wendy Yolanda Arthur
Bianca Claude Dmitri Esther Felix Greta Hugo Ingrid Jamal Kofi Linda Malik Nadia Oliver Petra Rafael Sofia Tariq
Valentina Wilhelm Aisha Bruno Chloe David Eva Francis Gloria Henrik Irene Jack Klara Louis Magda Nils Ophelia Pierre
Ruben Sarah Timo Violet William Xavier Yvonne Zoltan Agnes Bogdan Camille Dario Eileen Fiona Gabriel Hiroshi Iris
Joao Kenji Leila Miguel Naomi Olaf Pilar Ramon Sakura Thandi Ugo Veronika Wei Xenia Yannick Zara Akira Babak Cosima
Desmond Eszter Fynn Giulia Hamza Imani Jiho Kaan Ludmila Mwangi Nomsa Odile Pavel Roshni Sigrid Takumi Ulla Vikram
""".split() + [
    "José", "Zoë", "Björn", "Mary Ann", "Jean Paul", "Ana Lucia",
    "Carl Lang", "Amir Shah", "Lea Moreau", "Tomas Vega", "Kim Hale", "Ruth Adler", "Ben Okoro", "Ida Lund",
]  # fmt: skip

CITIES = """
Oslo Paris Rome Lima Cairo Berlin Madrid Vienna Dublin Prague Warsaw Athens Lisbon Helsinki Stockholm Copenhagen
Budapest Brussels Amsterdam Hamburg Munich Cologne Dresden Leipzig Bremen Zurich Geneva Basel Milan Turin Naples
Palermo Venice Bologna Barcelona Seville Bilbao Malaga Porto Braga Lyon Marseille Toulouse Bordeaux Nantes Lille London
Leeds Bristol Glasgow Cardiff Belfast Cork Galway Bergen Tampere Riga Tallinn Vilnius Minsk Odessa Lviv Bucharest Varna
Belgrade Zagreb Split Sarajevo Tirana Ankara Izmir Tehran Baghdad Amman Beirut Dubai Doha Karachi Lahore Delhi Mumbai
Chennai Kolkata Jaipur Dhaka Colombo Bangkok Hanoi Jakarta Manila Taipei Seoul Busan Tokyo Osaka Kyoto Nagoya Sapporo
Beijing Shanghai Chengdu Wuhan Perth Brisbane Adelaide Auckland Wellington Nairobi Lagos Accra Dakar Tunis Kampala
Durban Harare Lusaka Toronto Montreal Ottawa Calgary Boston Chicago Denver Seattle Houston Dallas Atlanta Portland
Havana Bogota Quito Santiago Montevideo Brasilia Caracas Medellin Arequipa
""".split() + [
    "New York", "San Diego", "Cape Town", "Hong Kong", "Los Angeles", "Santa Fe", "Buenos Aires", "Tel Aviv",
    "Addis Ababa", "Mexico City", "Fort Worth", "Baton Rouge", "Abu Dhabi", "Novi Sad", "San Jose", "New Haven",
    "Las Vegas", "El Paso", "Le Havre", "Port Louis", "Ciudad Real", "Long Beach", "Malmö", "Düsseldorf",
]  # fmt: skip

UNSEEN_NAMES = """
Thandiwe Xiomara Oluwaseun Bartholomew Saoirse Tenzin Ngozi Ignatius Aleksandra Kwabena Philippa Zbigniew Anneliese
Caspian Delphine Evangeline Fitzgerald Gwendolyn Hyacinth Isolde Jedediah Kalliope Lysander Marguerite Nikolai Octavia
Persephone Quillon Rosalind Siobhan Thaddeus Ulysses Vasilisa Wolfgang Yevgenia Zephyr Abioye Brunhilde Chidera
Domenico Eudora Ferdinand Guinevere Hortensia Ikaika Jovanka Kaveh Lorcan Mirabel Nasrin
""".split() + [
    "Renée", "Søren", "Anna Belle", "Mr. Thistle", "Dr. Vance", "Juan Carlos", "Noor Rahman", "Eli Stone",
]  # fmt: skip

UNSEEN_CITIES = """
Reykjavik Casablanca Ljubljana Antananarivo Kathmandu Ulaanbaatar Timbuktu Winnipeg Albuquerque Guadalajara Szczecin
Eindhoven Trondheim Salzburg Coimbra Granada Verona Rouen Ghent Aarhus Plovdiv Thessaloniki Tbilisi Yerevan Tashkent
Samarkand Isfahan Muscat Peshawar Hyderabad Yangon Cebu Fukuoka Incheon Kunming Hobart Dunedin Kigali Maputo Windhoek
Saskatoon Milwaukee Tucson Omaha Asuncion Valparaiso Cusco
""".split() + [
    "Rio Grande", "Porto Alegre", "Saint Louis", "New Orleans", "Kuala Lumpur", "San Salvador", "Santo Domingo",
    "Palm Springs", "Phnom Penh", "Cluj Napoca", "Santa Cruz", "Little Rock", "Den Haag", "Hull", "Tromsø", "Göteborg",
]  # fmt: skip
