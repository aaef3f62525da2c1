"""Word lists of the built-in salient-span rules.

Increment RULES_VERSION in `realm.spans.rules` when you change a list.
"""

import re

from spacy.lang.en.stop_words import STOP_WORDS


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


CAPITAL_STOP_WORDS = frozenset(word.capitalize() for word in STOP_WORDS if word.isalpha()) - {"Us"}

ABBREVIATIONS = _words(
    "St Mt Ft Jr Sr Dr Mr Mrs Ms Prof Rev Gen Col Capt Lt Sgt Gov Sen Inc Ltd Co Corp Bros Mme Hon No Nos Vol Op"
)
"""Capitalized abbreviations that include their full stop."""

TITLES = _words("""
    Mr Mrs Ms Miss Dr Prof Professor Sir Dame Lord Lady Queen King Prince Princess Emperor Empress
    Tsar Pope President Vice Prime Shah Minister Chancellor Senator Governor Mayor Congressman
    Congresswoman Judge Justice Captain Capt Colonel Col General Gen Lieutenant Lt Major Sergeant
    Sgt Admiral Commander Father Brother Sister Mother Bishop Archbishop Cardinal Reverend Rev Rabbi
    Sheikh Sultan Caliph Duke Duchess Count Countess Earl Baron Baroness Marquess Viscount Chief
    Secretary Ambassador Director Chairman Coach Detective Inspector Officer Private Corporal Doctor
    Uncle Aunt Archduke Imam Marshal Brigadier Representative Gov Sen Hon Crown Deputy Kaiser
    Premier Major-General Attorney Treasurer Commissioner Assistant Acting Leader Member Members
    Speaker Manager Executive Presidents Ministers
""")
"""Titles and roles: not part of the name that follows, and not a name alone."""

OFFICES = _words("""
    President Premier Prime Minister Chancellor Senator Governor Mayor Congressman Congresswoman
    Emperor Empress Pope Archbishop Ambassador Captain Colonel Lieutenant Admiral Professor
    Secretary Sir
""")
"""Titles that also end a preceding name."""

BYNAMES = _words(
    "Great Elder Younger Conqueror Terrible Silent Bold Bald Fat Pious Good Magnificent Confessor "
    "Baptist Apostle Lionheart"
)

NEVER_NAMES = _words("""
    I TV DVD DVDs DNA RNA API APIs LP EP EPs LPs CD CDs RAM ROM CPU GPU USB PhD Ph.D. MBA MVP CEO
    CFO DJ MC MP MPs PM AM FM GDP GNP ODI ODIs RBI RBIs ERA HIV AIDS BC BCE AD CE OK ID IQ PC PCs UV
    HD RPG CGI AC DC GT V8 II III IV V VI VII VIII IX X XI XII No Nos Vol Op No. Nos. Vol. Op. Mr.
    Mrs. Ms. Dr. Jr. Sr. Blu-ray R&B T-shirt UTC GMT EST PST CET Ma Mya Sun Moon Bachelor Master BA
    BSc MSc Test Tests Article Chapter Section Figure Table Volume Part Number Jr Sr Esq A.D. B.C.
    B.C.E. C.E. Latino Latinos CDP IPO ISBN URL VHS
""")

PARTICLES = _words(
    "de du des del della di da do dos das la le les el al von van der den ten ter bin bint ibn ben y e et und zu af &"
) | {
    *("de la", "de las", "de los", "von der", "van der", "van den", "van de"),
}
FOR_HEADS = _words("""
    Institute Center Centre Association Society Foundation Organization Organisation Agency Office
    Department School Academy Campaign Movement Council Committee Fund Party Award Awards Medal
    Prize Conference Program Programme Project Ministry Commission Convention Union Library Museum
    Alliance Coalition Front Network Bureau College Hospital Board Authority Federation League
""")
"""Words after which "for" is part of the name."""
AND_PAIRS = frozenset((("Rock", "Roll"), ("Trinidad", "Tobago"), ("Bosnia", "Herzegovina"), ("Antigua", "Barbuda")))
SMALL_WORDS = _words("""
    of the a an and in on to for with at by from or as is it de la le les du des del di da von und
    et y el vs 's 'n' n't no not but into me my
""")

HEADS = _words("""
    University College School Institute Academy Bank House Museum Ministry Department Church
    Cathedral Board Bureau Office Council Court Association Society Federation Union League
    Confederation Party Order Hall Center Centre Faculty National Royal Battle Siege Treaty War
    Republic Kingdom Empire Duchy County Province State States City Isle Island Islands Gulf Bay Sea
    Lake River Cape Mount Strait Straits Temple Palace Castle Tower Bridge Walk Book Gospel Act
    Declaration Congress Parliament Assembly Commission Committee Foundation Fund Conference Company
    Corporation Organization Organisation Agency Army Navy Guard Legion Corps Command Service
    Knights Medal Award Cup Championship Championships Festival Theatre Library Archives Hospital
    Conservatory Chamber Guild Brotherhood International American British European Federal United
    Democratic People World Children Games Campaign Movement Front Alliance Coalition Program
    Project
""")
"""First or last words of the part before "of" or "for" in names of institutions and places."""

POSSESSED = _words("""
    College Church Cathedral School Hospital Day Park Point Bay Island Islands Cup Vineyard League
    Party University County Hall Court Square Association Championship Championships Council Chapel
    Republic Guide Lynn Cross Creek Cove Landing Ferry Theatre Bench Singles Doubles Congress Army
    Liberation Institute Club Palace
""")
"""Words that continue a name after a possessive: St John's College, King's Cross."""

EVENTS = _words("""
    Olympics Olympic Paralympics Cup Championship Championships Games League Series Open Prix Awards
    Award Tournament Tour Festival Election Elections Season Masters Trophy Division Bowl Finals
    Final Euro Rally Convention Conference Draft Expo Marathon Worlds Classic Playoffs War Wars
    Battle Treaty Revolution Siege Census Act Eurovision
""")
ORGANISATION_WORDS = _words("""
    Inc Inc. Ltd Ltd. Corp Corp. Co Co. LLC plc PLC GmbH AG University College School Institute
    Academy Bank Company Corporation Ministry Department Association Society Federation Union
    Confederation Party Council Court Commission Committee Foundation Agency Army Navy Orchestra
    Records Pictures Studios Entertainment Club FC F.C. Rovers Museum Church Board Bureau Office
    Press Airlines Airways Motors Group Band Team Parliament Congress Senate House Hospital Library
    Organization Organisation Network Channel Radio Television Times Post News Magazine Brothers
    Bros Bros. Rangers Giants Tigers Lions Force Regiment Division Corps Guard
""")
PLACE_WORDS = _words("""
    River Lake Mount Mountain Mountains Island Islands Isle City County Province State States Street
    Avenue Road Park Bay Gulf Sea Ocean Cape Valley Creek Hill Hills Peninsula Desert Forest Beach
    Bridge Castle Palace Tower Square Airport Station Stadium Arena Highway Village Town District
    Region Republic Kingdom Empire Territory North South East West Northern Southern Eastern Western
    St. Mt. Fort Port New San Santa Los Las Strait Canal Falls Harbour Harbor Point Plaza Heights
    Springs Township Oblast Canyon
""")
BEFORE_PLACES = _words("in In at At from From near Near to towards across into toward outside throughout")
DEMONYM = re.compile(r"(?:ese|ish|[ie]an|[rc]an|French|German|Dutch|Greek|Swiss|Italian|Indian)$")
FIRST_NAMES = _words("""
    James John Robert Michael William David Richard Joseph Thomas Charles Christopher Daniel Matthew
    Anthony Mark Donald Steven Paul Andrew Joshua Kenneth Kevin Brian George Edward Ronald Timothy
    Jason Jeffrey Ryan Jacob Gary Nicholas Eric Jonathan Stephen Larry Justin Scott Benjamin Samuel
    Frank Gregory Raymond Alexander Patrick Jack Dennis Jerry Tyler Aaron Henry Douglas Peter Adam
    Nathan Zachary Walter Kyle Harold Carl Arthur Roger Keith Jeremy Lawrence Sean Christian Albert
    Joe Ethan Austin Jesse Willie Billy Bryan Bruce Ralph Roy Eugene Louis Philip Bobby Johnny Mary
    Patricia Jennifer Linda Elizabeth Barbara Susan Jessica Sarah Karen Lisa Nancy Betty Margaret
    Sandra Ashley Kimberly Emily Donna Michelle Carol Amanda Melissa Deborah Stephanie Rebecca
    Sharon Laura Cynthia Dorothy Amy Kathleen Angela Shirley Emma Anna Brenda Pamela Nicole Ruth
    Katherine Samantha Christine Catherine Virginia Debra Rachel Janet Maria Heather Diane Julie
    Joyce Victoria Kelly Christina Joan Evelyn Olivia Judith Martha Cheryl Megan Andrea Ann Anne
    Alice Jean Jane Ludwig Johann Wolfgang Friedrich Hans Karl Wilhelm Otto Franz Pierre Jacques
    François Claude Marie Louise Giovanni Giuseppe Antonio Francesco Marco Paolo Carlos Juan José
    Jose Luis Miguel Pedro Jorge Fernando Francisco Ivan Vladimir Sergei Mikhail Nikolai Alexei
    Boris Olga Mohammed Muhammad Ahmed Ali Hassan Omar Abdul Isaac Max Niels Erwin Werner Leonardo
    Galileo Winston Oscar Leo Martin Simon Tom Tim Jim Bob Bill Ben Dan Mike Steve Dave Chris Tony
    Fred Harry Sam Kate Nick Greg Ken Ray Barack Hillary Theodore Franklin Abraham Ernest Oliver
    Hugh Ian Neil Alan Allan Stuart Graham Colin
""")

STARTERS = STOP_WORDS | _words("""
    later early many another following according based born due currently instead prior former
    founded located notable numerous examples modern current game filming shooting construction
    production research lyrics development results figures critics fans scientists historians
    originally unlike unable thousands hundreds millions dozens similar original subsequent
    additional contemporary prominent natural regional local political economic chemical electric
    solid primary traditional classical typical various certain specific important significant major
    minor small large big great high low long short old good bad top best first second third fourth
    fifth people men women children students players members teams officials residents settlers
    observers others birds plants animals species data information education health art music film
    films series characters book books games song songs album overall like albums today yesterday
    tomorrow now soon once twice together apart shortly part half near nearby outside inside past
    despite given set led said says made known called named built used written produced directed
    released published shot played created hosted voiced described opened completed viewed weakened
    influenced owing contrary ahead keen likely less more fewer worldwide overseas abroad work life
    time year years day days week weeks month months century evidence legend tradition reviews sales
    profits rumours spring summer autumn fall winter summers winters note see please notice yes okay
    well oh let single double triple mixed left right human humans power water furthermore
    nonetheless regardless nevertheless moreover amid besides thanks higher lower until unless
    whether how why what lead medium media fellow teammate featuring starring
""")
"""Lower-case words that begin a sentence without being a name."""
STARTER_SUFFIX = re.compile(r"(?:ly|ing|tion|tions|ment|ments|ness|ity|ities|ism|ists|ings|ogy|ics)$")
AFTER_NAMES = _words("""
    is was are were has had have 's \u2019s and or also then did does do can could will would may
    might must should became becomes began begins won wins died dies made makes took takes went goes
    came comes said says wrote writes gave gives got left led met lost saw told thought found held
    kept ran sent set spent stood taught fell grew knew rose sold brought built bought broke chose
    drew fought who which that v vs never still later now soon first again himself herself itself in
    with plays lies stars remains remained serves features
""")
"""Words that often follow a name, but rarely a bare common noun, at the beginning of a sentence."""

MEASURES = _words("""
    m km cm mm ft feet foot metres meters miles mile acres hectares people inhabitants residents
    students kg g lb lbs tons tonnes copies votes points seats soldiers men women metre meter yards
    yard hours words pages households families troops species workers members % employees dollars
    pounds euros rpm cc hp kW MHz Hz GHz kHz MW volts units children square cubic million billion
    spectators
""")
"""Words after which a number that looks like a year is a quantity."""
