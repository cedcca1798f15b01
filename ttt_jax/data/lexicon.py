"""The words that fill the dialogue's sentences, most common first: slots draw from them with Zipf frequencies."""

_LISTS = {
    "name": """
        Anna Thomas Laura Peter Sarah Daniel Emma Martin Julia Simon Alice David Clara Robert Helen Oliver Nina Lucas
        Marta Henry Sophie Victor Irene Felix Diana Oscar Monica Hugo Teresa Walter Paula Edgar Lydia Conrad Sylvia
        Marcus Hannah Julian Rosa Leonard Vera Arthur Miriam Gregory Naomi Douglas Carmen Philip Ingrid Stephen Nora
        Bernard Elsa Raymond Judith Clifford Agnes Rupert Bianca Gordon Celia Malcolm Daphne Norman Estelle Warren
        Flora Desmond Greta Terence Harriet Alvin Imogen Cedric Jasmine Duncan Katrina Everett Louise Franklin
        Matilda Gilbert Nadia Howard Olivia Isaac Pamela Jerome Ramona Kenneth Sabrina Lionel Tamara Maurice Ursula
        Nelson Valerie Patrick Wendy Quentin Yvonne Roland Zelda Stanley Abigail Trevor Beatrice Vincent Constance
        Wesley Dorothy""",
    "city": """
        London Paris Boston Berlin Chicago Madrid Oslo Rome Dublin Seattle Vienna Lisbon Denver Prague Athens Toronto
        Warsaw Dallas Budapest Geneva Houston Helsinki Portland Stockholm Atlanta Brussels Phoenix Copenhagen Memphis
        Amsterdam Nashville Edinburgh Orlando Barcelona Detroit Hamburg Cleveland Munich Baltimore Florence Austin
        Venice Richmond Naples Omaha Valencia Tucson Krakow Montreal Glasgow Havana Manchester Santiago Liverpool
        Lima Bristol Cairo Cardiff Nairobi Leeds Sydney Belfast Melbourne Zurich Auckland Salzburg Tokyo Marseille
        Kyoto Bordeaux Seoul Antwerp Bangkok Rotterdam Delhi Gothenburg Mumbai Bergen Karachi Tallinn Istanbul Riga
        Ankara Vilnius Beirut Sofia Tunis Belgrade Casablanca Zagreb Dakar Bucharest Lagos Milan Accra Turin Kingston
        Seville Bogota Granada Caracas Malaga""",
    "food": """
        soup pasta bread rice curry salad pizza stew pancakes omelet chicken salmon lasagna potatoes dumplings tacos
        noodles porridge sandwiches risotto meatballs mushrooms cabbage lentils beans shrimp tofu cheesecake
        gingerbread couscous goulash paella sausages spinach pumpkin asparagus zucchini broccoli cauliflower turnips
        eggplant peppers tomatoes cucumbers carrots parsnips artichokes chickpeas burritos crackers muffins waffles
        biscuits brownies pudding trout lobster mackerel herring oysters turkey venison meatloaf casserole chowder
        gazpacho ravioli spaghetti gnocchi falafel hummus kebabs sushi tempura""",
    "ingredient": """
        garlic butter pepper onions cream lemon basil ginger cheese honey parsley vinegar cinnamon mustard thyme
        paprika rosemary almonds saffron cumin coriander nutmeg oregano vanilla walnuts sesame raisins cardamom
        turmeric fennel chives capers olives anchovies yogurt cloves peanuts coconut molasses horseradish""",
    "month": "May June January October March July December April August November September February",
    "day": "Monday Friday Sunday Saturday Wednesday Tuesday Thursday",
    "job": """
        teacher nurse engineer doctor driver lawyer baker writer painter farmer plumber carpenter librarian
        electrician pharmacist architect gardener mechanic dentist translator accountant journalist photographer
        firefighter musician surgeon biologist programmer tailor pilot jeweler geologist butcher waiter cashier
        chemist detective barber florist optician referee sculptor watchmaker zookeeper locksmith potter""",
    "color": """
        red blue green black white yellow brown orange purple gray silver pink golden turquoise crimson violet beige
        maroon scarlet lavender magenta olive navy amber""",
    "animal": """
        dog cat horse rabbit parrot goat turtle sheep donkey hamster duck goose lizard ferret chicken pony pigeon
        hedgehog canary tortoise squirrel llama peacock gecko budgie salamander alpaca raccoon falcon iguana""",
    "pet": """
        Max Bella Charlie Luna Rocky Daisy Buster Molly Shadow Ginger Pepper Biscuit Cookie Pumpkin Whiskers Smoky
        Patches Muffin Snowball Bandit Dusty Nugget Waffles Sparky Pickles Mittens Domino Socks Peanut Bubbles Clover
        Thunder Pebbles Marble Cricket Tiger Button Jasper Willow Ziggy""",
    "instrument": """
        piano guitar violin drums flute cello trumpet harp clarinet banjo organ saxophone accordion trombone mandolin
        oboe harmonica bassoon viola ukulele xylophone lute tuba piccolo""",
    "music": """
        jazz rock opera folk blues soul country disco gospel reggae swing techno flamenco ragtime tango punk bluegrass
        funk samba waltz""",
    "weather": """
        rain sunshine snow wind fog thunder hail frost drizzle sleet lightning mist showers clouds ice heat humidity
        blizzards hurricanes rainbows""",
    "hobby": """
        gardening painting swimming fishing knitting hiking dancing chess cycling photography sailing pottery climbing
        singing skiing archery bowling birdwatching woodworking origami sewing juggling skating surfing canoeing
        running embroidery calligraphy astronomy fencing""",
    "sport": """
        football tennis basketball baseball hockey volleyball cricket rugby badminton golf handball boxing wrestling
        gymnastics rowing curling karate judo squash lacrosse softball billiards""",
    "place": """
        park library station market museum beach harbor theater church bakery garage hospital castle bridge stadium
        airport school forest lake tower square garden bookshop pharmacy hotel factory farm cinema gallery monastery
        lighthouse cemetery fountain observatory aquarium courthouse vineyard waterfall quarry canyon""",
    "transport": "train bus car bike ferry taxi tram subway motorcycle plane scooter boat van truck helicopter canoe",
    "object": """
        book lamp chair phone ticket umbrella wallet camera basket blanket bottle clock mirror table jacket ladder
        suitcase candle pillow hammer kettle bicycle keyboard carpet scarf helmet necklace puzzle statue telescope
        notebook teapot whistle bracelet envelope shovel compass lantern curtain mattress thermometer backpack
        typewriter magnet calculator stapler vase toaster saucer bucket""",
    "relative": """
        brother mother sister father uncle aunt cousin grandmother nephew niece grandfather daughter son neighbor
        roommate stepbrother godmother""",
    "room": "kitchen bedroom garden bathroom garage hallway attic basement balcony office cellar pantry porch",
    "furniture": "table sofa shelf wardrobe cupboard bench drawer armchair bookcase mattress stool cabinet dresser",
    "feeling": """
        happy tired nervous proud surprised hungry excited sad calm worried grateful curious bored relieved lonely
        cheerful confused jealous hopeful embarrassed""",
    "quality": """
        good big small old quiet busy cheap strange lovely famous empty noisy modern narrow expensive colorful
        peaceful crowded ordinary enormous charming dusty elegant gloomy magnificent shabby""",
    "fruit": """
        apples oranges cherries grapes pears bananas plums peaches strawberries lemons melons apricots blueberries figs
        mangoes raspberries pineapples nectarines pomegranates gooseberries cranberries tangerines""",
    "tree": "oak pine maple birch willow cedar chestnut elm poplar cypress spruce hazel walnut magnolia juniper larch",
    "flower": "roses tulips daisies lilies sunflowers orchids violets poppies irises peonies lilacs marigolds jasmine",
    "country": """
        France Italy Spain Germany Canada Japan Norway Greece Ireland Mexico Portugal Brazil Sweden Egypt Poland Turkey
        Austria India Denmark Peru Iceland Morocco Finland Chile Kenya Hungary Thailand Belgium Vietnam Argentina
        Croatia Jamaica Scotland Ethiopia Romania Bolivia Malaysia Lithuania Tanzania Uruguay""",
    "subject": """
        history music biology geography chemistry poetry physics grammar economics philosophy algebra astronomy botany
        psychology literature geology medicine sculpture architecture linguistics""",
    "story": """
        detective ghost love war adventure pirate family space spy vampire robot dragon mountain island prison desert
        circus submarine""",
    "digit": "one two three four five six seven eight nine zero",
    "number": "two three five four ten six twenty seven eight twelve thirty nine forty fifteen fifty eleven sixty",
    "street": """
        Mill Church Park Station Garden River Castle Market Bridge School Forest King Queen Hill Harbor Chapel Orchard
        Meadow Willow Maple Spring Tower Abbey Walnut Canal Factory Temple Prospect Juniper Monument""",
    "drink": "tea coffee water juice milk lemonade cocoa cider soda wine beer eggnog smoothies broth",
    "clothes": """
        coat shirt shoes hat scarf dress sweater boots gloves jacket trousers socks belt raincoat sandals cardigan
        apron waistcoat slippers pajamas""",
    "tool": "hammer saw drill wrench brush ladder screwdriver pliers shovel rake chisel axe crowbar sandpaper trowel",
}

LISTS: dict[str, tuple[str, ...]] = {kind: tuple(words.split()) for kind, words in _LISTS.items()}
