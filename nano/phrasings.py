"""More ways to ask for what nano knows: for training alone, none is ever held out.

One that was never met is understood the sooner, the more others were. The fields are those of a kind's facts in
`nano.facts`.
"""

FURTHER = {
    "sum": """
        what is {a} and {b} together?
        {a} and {b} make what?
        {a} and {b} is how much?
        what is {b} more than {a}?
        how much is {b} more than {a}?
        if I have {a} apples and get {b} more, how many do I have?
        do you know the sum of {a} and {b}?
        find the sum of {a} and {b}.
        what will {a} plus {b} be?
        what does it make if you add {a} and {b}?
        please work out {a} plus {b}.
        let's add {a} and {b}.
        put {a} and {b} together.
        start with {a} and add {b}.
        I need to know what {a} plus {b} is.
        could you tell me how much {a} plus {b} is?
    """,
    "difference": """
        what is {b} less than {a}?
        how much is {b} less than {a}?
        if I have {a} apples and give away {b}, how many are left?
        {a} less {b} is how much?
        what is left if you take {b} from {a}?
        do you know the difference between {a} and {b}?
        find the difference between {a} and {b}.
        what will {a} minus {b} be?
        please work out {a} minus {b}.
        {a} take away {b} is what?
        let's take {b} away from {a}.
        start with {a} and take away {b}.
        I need to know what {a} minus {b} is.
        could you tell me how much {a} minus {b} is?
        what do you have when you take {b} away from {a}?
        how much do you have left when you take {b} from {a}?
    """,
    "product": """
        how much are {a} times {b}?
        take {b} {a} times.
        what is {b} taken {a} times?
        what do you get if you add {b} {a} times?
        what do you get when you take {b} {a} times?
        how many apples are in {a} bags of {b}?
        if {a} bags have {b} apples each, how many apples are there?
        if there are {b} apples in each of {a} bags, how many are there?
        {a} groups of {b} make how many?
        with {b} in each of {a} groups, how many are there?
        do you know the product of {a} and {b}?
        find the product of {a} and {b}.
        what will {a} times {b} be?
        please work out {a} times {b}.
        {a} times {b} makes what?
        {a} multiplied by {b} is what?
        let's multiply {a} by {b}.
        start with {a} and multiply it by {b}.
        I need to know what {a} times {b} is.
        could you tell me how much {a} times {b} is?
    """,
    "count": """
        can you count for me from {a} to {b}?
        count, starting at {a} and ending at {b}.
        please start at {a} and count to {b}.
        from {a} to {b}, count.
        from {a} to {b}, which numbers are there?
        go from {a} to {b}.
        give me the numbers from {a} to {b}.
        could you say every number from {a} to {b}?
        let me hear the numbers from {a} to {b}.
        name the numbers from {a} to {b}.
        do you know how to count from {a} to {b}?
        begin with {a} and count until you reach {b}.
    """,
    "after": """
        what {noun} is next after {x}?
        what {noun} follows {x}?
        what is right after {x}?
        after {x}, which {noun} comes?
        after {x} there is which {noun}?
        {x} comes before which {noun}?
        {x} is followed by what?
        do you know the {noun} after {x}?
        say what comes after {x}.
        I want to know what comes after {x}.
        if it is {x} now, what comes after?
        could you tell me what comes after {x}?
    """,
    "before": """
        what {noun} is right before {x}?
        which {noun} is before {x}?
        what is right before {x}?
        before {x}, which {noun} comes?
        before {x} there is which {noun}?
        {x} comes after which {noun}?
        {x} follows what?
        do you know the {noun} before {x}?
        say what comes before {x}.
        I want to know what comes before {x}.
        if it is {x} now, what came before?
        could you tell me what comes before {x}?
    """,
    "opposite": """
        the opposite of {x} is what?
        the opposite of {x} is which word?
        {x} is the opposite of which word?
        {x} and what are opposites?
        what is not {x} but the opposite?
        if it is not {x}, what is the opposite?
        do you know what the opposite of {x} is?
        please say the opposite of {x}.
        could you give me the opposite of {x}?
        tell me which word is the opposite of {x}.
        find the opposite of {x}.
        I need the opposite of {x}.
        {x} has which opposite?
        what do you call the opposite of {x}?
    """,
    "color": """
        what is the color that {x} has?
        the color of {x} is what?
        {x} has which color?
        {x} has what color?
        say what color {x} is.
        give me the color of {x}.
        what color would {x} be?
        which color do you see when you look at {x}?
        could you tell me the color of {x}?
        do you know which color {x} has?
        if I look at {x}, what color do I see?
        name the color that {x} has.
    """,
    "sound": """
        which noise is made by {x}?
        what sound comes from {x}?
        {x} makes what sound?
        {x} makes which noise?
        what would {x} say?
        say what {x} says.
        do you know what noise {x} makes?
        can you tell me what noise {x} makes?
        could you tell me what sound {x} makes?
        give me the sound of {x}.
        if {x} could talk, what would it say?
        what do you hear when you hear {x}?
        tell me what sound {x} makes.
    """,
    "animal": """
        {x} is what which animal says?
        {x} is the sound of which animal?
        {x} is said by which animal?
        if you hear {x}, which animal is it?
        I hear {x}. Which animal is it?
        what animal makes the sound {x}?
        could you tell me which animal says {x}?
        say which animal says {x}.
        the animal that says {x} is what?
        do you know the animal that says {x}?
        what kind of animal says {x}?
        I want to know which animal says {x}.
    """,
    "capital": """
        the capital of {x} is what?
        the capital of {x} is which city?
        {x} has which capital?
        {x} has what city as its capital?
        what capital does {x} have?
        which capital does {x} have?
        say the capital of {x}.
        could you tell me the capital of {x}?
        do you know what the capital of {x} is?
        tell me which city is the capital of {x}.
        please tell me what the capital of {x} is.
        how is the capital of {x} called?
        in {x}, which city is the capital?
    """,
    "country": """
        the country with the capital {x} is which?
        {x} is a capital. Of which country?
        {x} is which country's capital?
        for which country is {x} the capital?
        in which country is {x} the capital?
        do you know what country {x} is the capital of?
        can you tell me which country has the capital {x}?
        could you tell me what country has the capital {x}?
        say which country has the capital {x}.
        what is the country with the capital {x}?
        I want to know which country {x} is the capital of.
        please name the country with the capital {x}.
    """,
    "unit": """
        {y} is how many {x}?
        {y} makes how many {x}?
        how many {x} make {y}?
        how many {x} has {y}?
        of {x}, how many are in {y}?
        the number of {x} in {y} is what?
        say how many {x} there are in {y}.
        say how many {x} {y} has.
        could you tell me how many {x} are in {y}?
        can you tell me how many {x} {y} has?
        tell me the number of {x} in {y}.
        do you know how many {x} there are in {y}?
        if I have {y}, how many {x} do I have?
        I want to know how many {x} {y} has.
    """,
    "favorite": """
        which {x} do you like the most?
        of all, which {x} is your favorite?
        your favorite {x} is what?
        could you tell me your favorite {x}?
        what would be your favorite {x}?
        say your favorite {x}.
        name your favorite {x}.
        do you know your favorite {x}?
        what {x} is your favorite?
        is there a {x} that you like best?
        do you have one {x} that you like best?
        tell me what your favorite {x} is.
    """,
    "name": """
        your name is what?
        what name do you have?
        which name do you have?
        how should I call you?
        how do people call you?
        could you tell me your name?
        could I know your name?
        may I ask who you are?
        may I ask your name?
        what do your friends call you?
        do people call you something?
        who am I talking to?
        who is speaking?
        give me your name.
    """,
    "what": """
        you are what?
        what exactly are you?
        what kind of computer are you?
        what kind of model are you?
        which kind of thing are you?
        are you a model?
        are you a person or a machine?
        are you alive?
        are you some kind of machine?
        could you tell me what you are?
        do you know if you are a machine?
        am I talking to a machine?
        am I talking to a person?
        is this a computer or a person?
    """,
    "hobby": """
        do you like to do something for fun?
        what are your favorite hobbies?
        what do you do when you have time?
        what hobbies do you have?
        which hobbies do you have?
        is there a hobby that you have?
        tell me what you do for fun.
        please tell me your hobby.
        could you tell me about your hobby?
        what are you doing all day?
        how do you spend your free time?
        do you do something in your free time?
    """,
    "feeling": """
        how is it going?
        how are things?
        how have you been?
        are you doing well?
        are you doing okay today?
        are you feeling okay?
        do you feel okay?
        is everything okay with you?
        could you tell me how you are?
        please tell me how you feel today.
        say how you feel.
        how are you right now?
    """,
    "like": """
        what are the things you like?
        what is it that you like?
        what is it that you love?
        which thing do you like best?
        which things do you love most?
        could you tell me what you love?
        can you tell me what you like best?
        say what you like.
        are there things that you like?
        are there things that you love?
        is there anything you like?
        do you like anything?
    """,
    "age": """
        your age is what?
        are you very old?
        are you very young?
        how young are you?
        how many years have you lived?
        could you tell me how old you are?
        could you tell me your age?
        say how old you are.
        when is your birthday?
        do you know when you were born?
        tell me if you are old.
        were you born a long time ago?
    """,
    "home": """
        your home is where?
        do you live somewhere?
        where can I find you?
        where are you now?
        where are you living?
        where do you stay?
        could you tell me where you live?
        say where you live.
        do you have a house?
        do you know where you are?
        is there a place where you live?
        in what city is your home?
    """,
    "ability": """
        what are you able to do?
        what are the things you can do?
        what is it that you can do?
        what can I do with you?
        what questions can you answer?
        which questions do you answer?
        how could you help me?
        could you help me?
        can you do something for me?
        say what you can do.
        do you know something?
        what could I ask you?
        what may I ask you?
    """,
    "weather": """
        the weather is how?
        what will the weather be like tomorrow?
        how will the weather be?
        how is it outside?
        is it snowing?
        is it snowing outside?
        is it warm outside?
        is it hot today?
        will it rain?
        will it snow tomorrow?
        do I need a coat today?
        does it rain?
        does the sun shine?
        is the sun out today?
        do you know what the weather is like?
    """,
    "greeting": """
        {x}, my dear Nano.
        {x}, dear friend.
        {x} to you, Nano.
        {x} to you, my friend.
        {x}, machine.
        {x}, who is there?
        {x}, it is me.
        {x}, I am here again.
        well, {x}.
        oh, {x}.
        {x}, can we talk?
        let me say {x}.
    """,
    "farewell": """
        {x}, machine.
        {x}, dear friend.
        {x} to you.
        well, {x}.
        well then, {x}.
        now I have to go, {x}.
        I must go, {x}.
        I am going now, {x}.
        that was all, {x}.
        this is all for today, {x}.
        let me say {x}.
        thank you and {x}.
    """,
    "thanks": """
        thank you for this.
        thank you for helping me.
        thanks for helping me.
        thanks for that.
        thanks a lot.
        thank you a lot.
        thanks, dear Nano.
        thank you, dear friend.
        let me thank you.
        I thank you.
        I thank you very much.
        well, thank you.
        good, thanks.
    """,
    "joke": """
        do you have a joke for me?
        do you have a joke?
        can I hear a joke?
        let me hear a joke.
        let me laugh.
        I need a joke.
        please give me a joke.
        what is a good joke?
        which jokes do you know?
        do you know something funny?
        could you say something funny?
        could you make me laugh?
        tell a joke.
        a joke, please.
    """,
    "unknown": """
        who is the queen of {country}?
        who was the last king of {country}?
        how many cities are in {country}?
        is {country} big?
        is {city} far from here?
        which is bigger, {city} or {other}?
        what food do people like in {city}?
        what is {thing} made of?
        how many people have {thing}?
        how old can {animal} be?
        how big is {animal}?
        can {animal} swim?
        what is the name of {animal}?
        is it late in {city}?
        when was {city} built?
        which river is in {city}?
    """,
}
"""Lines by the name of the kind."""
